"""The endpoints by starlette's test client, on the tiny model and the programs of test_engine.py. 3 s beside them."""

import json
import threading
import time
from unittest import mock

import pytest

from bench.serve.engine_faults import failing
from hisa_jax.models import Sampling, passes
from hisa_jax.models.tokens import Bytes

from .. import serving

testclient = pytest.importorskip("starlette.testclient")
app = pytest.importorskip("hisa_jax.models.serve.app")
pytest.importorskip("httpx")
from hisa_jax.models.chat import ChatTemplate  # noqa: E402

TOKENIZER = Bytes(serving.VOCABULARY)
PROMPTS = ["12+34:", "12+35", "7*8"]
TEMPLATE = "{% for m in messages %}{{ m.content }}+{% endfor %}"


def server(template=True, **options):
    made = ChatTemplate(TEMPLATE, "test") if template else None
    engine = serving.engine(tokenizer=TOKENIZER, **options.pop("engine", {}))
    return app.Server(engine, "tiny", template=made, **options)


@pytest.fixture(scope="module")
def client():
    with testclient.TestClient(server().application()) as made:
        yield made


@pytest.fixture(scope="module")
def wanted():
    """(text, reason) of each prompt alone."""
    how = Sampling(max_tokens=8, temperature=1.0, seed=5, ignore_eos=True)
    tokens = serving.one_by_one(PROMPTS, [how] * len(PROMPTS), TOKENIZER)
    return [(TOKENIZER.decode(row), "length") for row in tokens]


def ask(client, path="/v1/completions", **body):
    return client.post(path, json={"model": "tiny", "max_tokens": 8, "seed": 5, "ignore_eos": True} | body)


def events(response):
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_answers_whole_and_streamed_are_those_that_each_prompt_gets_alone(client, wanted):
    body = ask(client, prompt=PROMPTS).json()
    assert [(one["text"], one["finish_reason"]) for one in body["choices"]] == wanted
    assert body["usage"] == {"prompt_tokens": 14, "completion_tokens": 24, "total_tokens": 38}
    assert body["object"] == "text_completion" and body["model"] == "tiny"
    *chunks, last = events(ask(client, prompt=PROMPTS, stream=True, stream_options={"include_usage": True}))
    for index, (text, reason) in enumerate(wanted):
        mine = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
        assert "".join(choice["text"] for choice in mine) == text
        assert [choice["finish_reason"] for choice in mine] == [None] * (len(mine) - 1) + [reason]
    assert last["choices"] == [] and last["usage"] == body["usage"]


def test_token_ids_echo_and_several_answers(client, wanted):
    ids = [TOKENIZER.encode(prompt) for prompt in PROMPTS]
    for prompt, texts in ((ids, wanted), (ids[0], wanted[:1])):
        assert [c["text"] for c in ask(client, prompt=prompt).json()["choices"]] == [text for text, *_ in texts]
    for is_streamed in (False, True):
        response = ask(client, prompt=PROMPTS[0], echo=True, n=2, stream=is_streamed)
        chunks = events(response) if is_streamed else [response.json()]
        texts = ["", ""]
        for choice in (choice for chunk in chunks for choice in chunk["choices"]):
            texts[choice["index"]] += choice["text"]
        assert texts[0] == PROMPTS[0] + wanted[0][0] and texts[1] != texts[0] and texts[1].startswith(PROMPTS[0])
    assert ask(client, prompt=PROMPTS[0], n=2).json()["choices"][1]["text"] == texts[1].removeprefix(PROMPTS[0])


def test_a_stop_text_and_log_probabilities(client, wanted):
    text = wanted[0][0]
    choice = ask(client, prompt=PROMPTS[0], stop=text[3:5], logprobs=2).json()["choices"][0]
    assert choice["text"] == text[: text.index(text[3:5])] and choice["finish_reason"] == "stop"
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == text[: text.index(text[3:5]) + 2]
    assert logprobs["text_offset"] == [*range(len(logprobs["tokens"]))]
    for value, top in zip(logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True):
        assert len(top) == 2 and value <= max(top.values()) <= 0
    streamed = events(ask(client, prompt=PROMPTS[0], logprobs=0, stream=True))
    tokens = [
        token for chunk in streamed for c in chunk["choices"] if c["logprobs"] for token in c["logprobs"]["tokens"]
    ]
    assert "".join(tokens) == text


def test_chat_by_the_template(client, wanted):
    messages = [{"role": "system", "content": "12"}, {"role": "user", "content": [{"type": "text", "text": "34:"}]}]
    fields = dict(path="/v1/chat/completions", messages=messages, logprobs=True, top_logprobs=1)
    body = ask(client, **fields).json()
    text = body["choices"][0]["message"]["content"]
    assert body["object"] == "chat.completion" and body["choices"][0]["message"]["role"] == "assistant"
    assert text == ask(client, prompt="12+34:+").json()["choices"][0]["text"]
    content = body["choices"][0]["logprobs"]["content"]
    assert "".join(one["token"] for one in content) == text and all(len(one["top_logprobs"]) == 1 for one in content)
    first, *chunks = events(ask(client, **fields, stream=True))
    assert first["object"] == "chat.completion.chunk" and first["choices"][0]["delta"]["role"] == "assistant"
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == text
    assert chunks[-1]["choices"][0]["delta"] == {} and chunks[-1]["choices"][0]["finish_reason"] == "length"


REFUSED = [
    ({"prompt": "1" * 60}, 400, "prompt has 60, and 8 are wanted", "context_length_exceeded"),
    ({"prompt": "1" * 70}, 400, "maximum context length is 64 tokens", "context_length_exceeded"),
    ({}, 400, "prompt is None, wanted text or token ids", None),
    ({"prompt": ""}, 400, "prompt is empty", None),
    ({"prompt": [61]}, 400, "prompt has token 61, wanted 0 to 60", None),
    ({"prompt": [1.5]}, 400, "prompt is 1.5, wanted text", None),
    ({"prompt": "z"}, 400, "prompt holds byte 122", None),
    ({"prompt": "1", "model": "gpt"}, 404, "the model 'gpt' is not served, 'tiny' is", "model_not_found"),
    ({"prompt": "1", "temperature": -1}, 400, "temperature=-1, wanted a number of at least 0", None),
    ({"prompt": "1", "top_p": "a"}, 400, "top_p='a', wanted", None),
    ({"prompt": "1", "max_tokens": 0}, 400, "max_tokens=0, wanted an int of at least 1", None),
    ({"prompt": "1", "logprobs": 21}, 400, "logprobs=21, wanted at most 20", None),
    ({"prompt": "1", "logprobs": 1, "echo": True}, 400, "echo with logprobs) are not built", None),
    ({"prompt": "1", "n": 0}, 400, "n is 0, wanted 1 to 128", None),
    ({"prompt": "1", "stop": ["a"] * 17}, 400, "stop has 17 texts, wanted at most 16", None),
    ({"prompt": "1", "stop_token_ids": [61]}, 400, "stop_ids[0] is 61", None),
    ({"prompt": "1", "stream": 1}, 400, "stream is 1, wanted true or false", None),
    ({"prompt": "1", "stream_options": {"include_usage": True}}, 400, "stream_options wants stream: true", None),
    ({"prompt": "1", "frequency_penalty": 0.5}, 400, "frequency_penalty is 0.5, which is not built", "unsupported"),
    ({"prompt": "1", "tempreature": 1}, 400, "'tempreature' is no field", "unknown_field"),
]


@pytest.mark.parametrize(("body", "status", "message", "code"), REFUSED, ids=[case[2] for case in REFUSED])
def test_what_is_not_answered_is_said_in_openais_form(client, body, status, message, code):
    response = ask(client, **body)
    error = response.json()["error"]
    assert response.status_code == status and message in error["message"] and error["code"] == code
    assert error.keys() == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"


def test_bad_chats_bodies_paths_and_keys(client):
    for body, message in (
        ({}, "messages is None"),
        ({"messages": [{"role": "user"}]}, "messages[0].content is None"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "parts that are not text: not built"),
        ({"messages": [{"role": "user", "content": "1"}], "tools": [{}]}, "tools is [{}], which is not built"),
        ({"messages": [{"role": "user", "content": "1"}], "top_logprobs": 2}, "top_logprobs wants logprobs: true"),
    ):
        response = ask(client, "/v1/chat/completions", **body)
        assert response.status_code == 400 and message in response.json()["error"]["message"]
    for content, status in ((b"{", 400), (b"[1]", 400), (b"\xff", 400), (b" " * (2**23 + 1), 413), (b"[" * 10**5, 400)):
        response = client.post("/v1/completions", content=content)
        assert response.status_code == status and response.json()["error"]["type"] == "invalid_request_error"
    assert client.get("/nowhere").json()["error"]["message"] == "GET /nowhere: Not Found"
    assert client.get("/v1/completions").status_code == 405
    with testclient.TestClient(server(template=False, api_keys=["one", "two"]).application()) as keyed:
        for headers, status in (
            ({}, 401),
            ({"authorization": "Bearer no"}, 401),
            ({"authorization": "Bearer two"}, 200),
        ):
            assert keyed.get("/v1/models", headers=headers).status_code == status
            assert keyed.post("/look", json={}, headers=headers).status_code == (401 if status == 401 else 400)
        assert keyed.get("/health").status_code == 200
        response = keyed.post(
            "/v1/chat/completions", json={"messages": [{"role": "user", "content": "1"}]},
            headers={"authorization": "Bearer one"},
        )  # fmt: skip
        assert response.json()["error"]["code"] == "no_chat_template"


def test_models_health_metrics_and_the_page(client):
    (card,) = client.get("/v1/models").json()["data"]
    assert card["id"] == "tiny" and card == client.get("/v1/models/tiny").json() and card["max_model_len"] == 64
    assert client.get("/v1/models/other").status_code == 404
    assert client.get("/health").json() == {"status": "ok"}
    ask(client, prompt="12")
    shown = dict(line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if line[0] != "#")
    assert float(shown['hisa_jax_requests_total{outcome="length"}']) > 0 and float(shown["hisa_jax_tokens_total"]) >= 8
    assert float(shown["hisa_jax_time_to_first_token_seconds_count"]) > 0
    assert shown["hisa_jax_requests_running"] == shown["hisa_jax_requests_waiting"] == "0.0"
    assert "<!doctype html>" in client.get("/").text


def test_a_full_queue_is_429_and_a_server_that_stops_503():
    made = server(most_waiting=0)
    with testclient.TestClient(made.application()) as busy:
        assert ask(busy, prompt="1", n=4).status_code == 200  # as many as there are rows
        response = ask(busy, prompt="1", n=5)
        assert response.status_code == 429 and response.json()["error"]["code"] == "queue_full"
        made.most_waiting = 64
        busy.portal.call(made.serving.close)
        assert ask(busy, prompt="1").status_code == 503 and busy.get("/health").status_code == 503
    assert made._engine.pool.n_free == made._engine.pool.n_pages


def test_a_fault_that_stays_is_500_and_the_next_request_is_served(client, wanted, caplog):
    with (
        failing("read", RuntimeError("out of memory"), nth=1),
        failing("verify", RuntimeError("out of memory"), nth=2),
    ):
        assert ask(client, prompt=PROMPTS[0]).json()["choices"][0]["text"] == wanted[0][0]  # done again
    with mock.patch.object(passes, "read", side_effect=RuntimeError("broken")):
        response = ask(client, prompt=PROMPTS[0])
        assert response.status_code == 500 and "failed: RuntimeError: broken" in response.json()["error"]["message"]
        *_, told = ask(client, prompt=PROMPTS[0], stream=True).text.strip().split("\n\n")
        assert json.loads(told.removeprefix("data: "))["error"]["type"] == "server_error"
    assert ask(client, prompt=PROMPTS[0]).json()["choices"][0]["text"] == wanted[0][0]


def test_clients_that_go_away_end_their_requests():
    """By the ASGI protocol itself, since the test client waits for answers."""
    made = server()
    with testclient.TestClient(made.application()) as client:
        for is_streamed in (False, True):
            body = json.dumps(
                {"prompt": "12+34:", "max_tokens": 50, "ignore_eos": True, "stream": is_streamed}
            ).encode()
            sent, gone = [], threading.Event()

            async def run(body=body, sent=sent, gone=gone):
                messages = [{"type": "http.request", "body": body, "more_body": False}]

                async def receive():
                    if messages:
                        return messages.pop()
                    while not gone.is_set():
                        await app.asyncio.sleep(0.001)
                    return {"type": "http.disconnect"}

                async def send(message):
                    sent.append(message)

                scope = {
                    "type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b"",
                    "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http",
                }  # fmt: skip
                await client.app(scope, receive, send)

            slow = SlowStep(made._engine)
            with slow:
                task = client.portal.start_task_soon(run)
                slow.wait_for(3)
                gone.set()
                task.result(timeout=10)
            for _ in range(500):
                if made._engine.is_idle:
                    break
                time.sleep(0.01)
            assert made._engine.is_idle and slow.n < 40, "the request was not cancelled"
        shown = client.get("/metrics").text
        assert 'hisa_jax_requests_total{outcome="cancelled"} 2.0' in shown


class SlowStep:
    """Steps of an engine that take 20 ms at least, counted."""

    def __init__(self, engine):
        self.engine, self.n, self._more = engine, 0, threading.Condition()

    def __enter__(self):
        real = type(self.engine).step

        def step():
            report = real(self.engine)
            time.sleep(0.02)
            with self._more:
                self.n += 1
                self._more.notify_all()
            return report

        self.engine.step = step

    def __exit__(self, *error):
        del self.engine.step

    def wait_for(self, n):
        with self._more:
            assert self._more.wait_for(lambda: self.n >= n, timeout=30)
