"""The server in a process of its own, asked by the `openai` package. About 40 s on two cores, most of it to start."""

import concurrent.futures
import shutil
import threading
import time
import urllib.request

import pytest

from .. import golden
from .process import served

openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")
pytestmark = pytest.mark.exhaustive
SIZES = ("--dtype", "float32", "--rows", 4, "--max-length", 128, "--chunk", 16, "--draft", 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, whose tokens are bytes up to 100, with a chat template."""
    made = tmp_path_factory.mktemp("checkpoint") / "tiny"
    shutil.copytree(golden.FOLDER / "glm5", made)
    (made / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    return made


@pytest.fixture(scope="module")
def server(folder):
    with served("--checkpoint", folder, "--api-key", "secret", "--max-waiting", 40, *SIZES) as made:
        yield made
        assert made.stop() == (0, True), made.lines


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0)


SAME = {"max_tokens": 12, "temperature": 1.0, "seed": 3}


def test_completions_and_chats_whole_and_streamed_are_the_same(client):
    (model,) = client.models.list().data
    assert model.id == "tiny" and client.models.retrieve("tiny").id == "tiny"
    whole = client.completions.create(model="tiny", prompt="HELLO", logprobs=3, **SAME)
    chunks = list(
        client.completions.create(
            model="tiny", prompt="HELLO", stream=True, stream_options={"include_usage": True}, **SAME
        )
    )
    text = whole.choices[0].text
    assert text and "".join(chunk.choices[0].text for chunk in chunks[:-1]) == text
    assert whole.usage.completion_tokens == 12 == chunks[-1].usage.completion_tokens
    assert len(whole.choices[0].logprobs.token_logprobs) == 12 == len(whole.choices[0].logprobs.top_logprobs)
    messages = [{"role": "user", "content": "HEL"}, {"role": "user", "content": "LO"}]
    chat = client.chat.completions.create(model="tiny", messages=messages, logprobs=True, top_logprobs=2, **SAME)
    assert chat.choices[0].message.content == text and len(chat.choices[0].logprobs.content[0].top_logprobs) == 2
    parts = client.chat.completions.create(model="tiny", messages=messages, stream=True, **SAME)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == text
    stopped = client.completions.create(model="tiny", prompt="HELLO", stop=[text[4:6]], **SAME)
    assert stopped.choices[0].text == text[: text.index(text[4:6])] and stopped.choices[0].finish_reason == "stop"
    echoed = client.completions.create(model="tiny", prompt=["HELLO", "YOU"], n=2, echo=True, **SAME)
    assert [choice.text[:3] for choice in echoed.choices] == ["HEL", "HEL", "YOU", "YOU"]
    assert echoed.choices[0].text == "HELLO" + text


def test_errors_are_those_that_the_package_knows(client, server):
    with pytest.raises(openai.NotFoundError, match="'other' is not served") as error:
        client.completions.create(model="other", prompt="A")
    assert error.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="maximum context length is 128") as error:
        client.completions.create(model="tiny", prompt="A" * 200)
    assert error.value.code == "context_length_exceeded" and error.value.param == "prompt"
    with pytest.raises(openai.BadRequestError, match="n is 0"):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "A"}], n=0)
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0).models.list()
    with pytest.raises(openai.RateLimitError, match="too many requests wait already"):
        client.completions.create(model="tiny", prompt="A", n=60, **SAME)


def test_many_clients_get_what_each_gets_alone_and_those_that_go_away_leave_nothing(client, server):
    prompts = [f"CLIENT {i % 10}" for i in range(40)]
    alone = [client.completions.create(model="tiny", prompt=prompt, **SAME).choices[0].text for prompt in prompts[:10]]

    def one(i):
        stream = client.completions.create(model="tiny", prompt=prompts[i], stream=True, **SAME)
        if i % 5 == 4:
            next(iter(stream))
            stream.close()
            return None
        return "".join(chunk.choices[0].text for chunk in stream)

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        texts = list(pool.map(one, range(40)))
    assert [text for i, text in enumerate(texts) if i % 5 != 4] == [alone[i % 10] for i in range(40) if i % 5 != 4]
    for _ in range(100):
        shown = urllib.request.urlopen(f"{server.url}/metrics").read().decode()
        if "hisa_jax_requests_running 0.0" in shown and "hisa_jax_requests_waiting 0.0" in shown:
            break
        time.sleep(0.1)
    else:
        raise AssertionError("requests of clients that went away still run")


@pytest.mark.parametrize("grace", [20, 0])
def test_a_server_that_is_told_to_stop_finishes_or_cancels(folder, grace):
    with served("--checkpoint", folder, "--grace", grace, *SIZES) as made:
        client = openai.OpenAI(base_url=f"{made.url}/v1", api_key="none", max_retries=0)
        stream = client.completions.create(model="tiny", prompt="HELLO", max_tokens=100, seed=1, stream=True)
        chunks, is_whole = [next(iter(stream))], []

        def read():
            try:
                chunks.extend(stream)
                is_whole.append(chunks[-1].choices[0].finish_reason == "length")
            except Exception:
                is_whole.append(False)

        reading = threading.Thread(target=read)
        reading.start()
        assert made.stop() == (0, True), made.lines
        reading.join(10)
        assert is_whole == [True] if grace else is_whole in ([False], [True])


def test_what_cannot_be_served_is_said_before_a_minute_is_lost(folder, tmp_path):
    for arguments, told in (
        (("--checkpoint", tmp_path), "wanted a folder with a config.json"),
        (("--checkpoint", folder, "--max-length", 10**6), "wanted at most 256, the model's positions"),
        (("--checkpoint", folder, "--indexer", "hisa", "--candidates", 3), "--indexer: .*candidates"),
    ):
        with pytest.raises(RuntimeError, match=told):
            served(*arguments).__enter__()


def test_what_methods_select_and_recall_are_shown(client, server):
    """The numbers are those of a text of more tokens than are selected."""
    http = client._client
    headers = {"authorization": "Bearer secret"}
    text = "THE QUICK BROWN FOX JUMPS OVER THE LAZY DOG AND RUNS AWAY"
    body = http.post(
        f"{server.url}/look", json={"text": text, "layer": 1, "topk": 8}, headers=headers, timeout=120
    ).json()
    assert "".join(body["tokens"]) == text and body["query"] == len(text) - 1 and body["layers"] == [0, 1, 2]
    flat, *others = body["methods"]
    assert [flat["name"], *(one["name"] for one in others)] == ["flat", "HISA", "scan", "block-sparse"]
    assert flat["recall"] == 1 and [len(one["positions"]) for one in (flat, *others[:2])] == [8] * 3
    for one in others:
        assert one["recall"] == len({*flat["positions"]} & {*one["positions"]}) / 8 and 0 < one["mass"] <= 1
    for bad, told in (({"layer": 3}, "layer is 3"), ({"query": 99}, "query is 99"), ({"topk": 9}, "topk is 9")):
        response = http.post(f"{server.url}/look", json={"text": text, **bad}, headers=headers)
        assert response.status_code == 400 and told in response.json()["error"]["message"]
    client.completions.create(model="tiny", prompt=text, **SAME)
    shown = http.get(f"{server.url}/metrics?recall=1", timeout=120).text
    assert all(f'hisa_jax_recall{{layer="{i}"}} 1.0' in shown for i in range(3))
