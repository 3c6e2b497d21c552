"""OpenAI's requests to values of ours, and ours to its answers. No network here."""

import dataclasses
import functools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hisa_jax.models.checks import shown
from hisa_jax.models.sampling import Logprobs, Sampling
from hisa_jax.models.tokens import Bytes, Tokenizer

MOST_STOPS, MOST_CHOICES = 16, 128
_COMPLETION_TOKENS = 16  # without max_tokens, as OpenAI has it
# What clients send that changes no answer.
_WITHOUT_EFFECT = {"metadata", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user"}
# What would change the answer and is not built: only the value that asks for nothing is taken.
_NOT_BUILT: dict[str, tuple] = {
    "best_of": (None, 1), "frequency_penalty": (None, 0), "logit_bias": (None, {}), "presence_penalty": (None, 0),
    "suffix": (None, ""), "response_format": (None, {"type": "text"}), "tools": (None, []),
    "tool_choice": (None, "none", "auto"), "functions": (None, []), "modalities": (None, ["text"]),
    "parallel_tool_calls": (None, True, False), "reasoning_effort": (None,), "prediction": (None,),
}  # fmt: skip
_SAMPLING = {
    "frequency_penalty", "ignore_eos", "logit_bias", "logprobs", "max_tokens", "min_p", "model", "n",
    "presence_penalty", "seed", "stop", "stop_token_ids", "stream", "stream_options", "temperature", "top_k", "top_p",
}  # fmt: skip
_OF_COMPLETIONS = _SAMPLING | {"best_of", "echo", "prompt", "suffix"}
_OF_CHAT = (_SAMPLING | {"max_completion_tokens", "messages", "top_logprobs"} | _NOT_BUILT.keys()) - {
    "best_of", "suffix"
}  # fmt: skip


class RequestError(Exception):
    """A request that is not answered, in OpenAI's form.

    Args:
        message: what is wrong.
        status: of HTTP.
        param: the field that is wrong.
        code: a word for programs.
        kind: OpenAI's type of error.
    """

    def __init__(
        self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None,
        kind: str = "invalid_request_error",
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.message, self.status, self.param, self.code, self.kind = message, status, param, code, kind

    def body(self) -> dict[str, Any]:
        """What is sent."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ask:
    """One request to the server, which may be several to the engine.

    Attributes:
        is_chat: which endpoint it came to.
        prompts: token ids of each.
        samplings: `n` for each prompt, of different seeds.
        is_streamed: whether pieces are sent as they come.
        has_usage: whether a stream ends with numbers of tokens.
        echo: texts to begin the answers with, one a prompt.
    """

    is_chat: bool
    prompts: tuple[tuple[int, ...], ...]
    samplings: tuple[Sampling, ...]
    is_streamed: bool
    has_usage: bool
    echo: tuple[str, ...]

    @property
    def n(self) -> int:
        """Answers a prompt."""
        return len(self.samplings)


def read_completion(body: Any, tokenizer: Tokenizer, vocabulary: int, room: int) -> Ask:
    """Of `/v1/completions`.

    Args:
        body: the JSON.
        tokenizer: of the model.
        vocabulary: its tokens.
        room: tokens that a request may have, prompt and answer together.

    Raises: RequestError: by the field that is wrong.
    """
    given = _fields(body, _OF_COMPLETIONS)
    prompts, texts = _prompts(given.get("prompt"), tokenizer, vocabulary)
    longest = max(map(len, prompts))
    sampling = _sampling(given, longest, room, _COMPLETION_TOKENS, given.get("logprobs"), "logprobs")
    is_echoed = _flag(given, "echo")
    if is_echoed and sampling.logprobs is not None:
        raise RequestError("logprobs of a prompt (echo with logprobs) are not built", param="logprobs")
    return Ask(
        is_chat=False, prompts=prompts, samplings=_choices(given, sampling, len(prompts)),
        echo=texts if is_echoed else (), **_stream_fields(given),
    )  # fmt: skip


def read_chat(
    body: Any, tokenizer: Tokenizer, vocabulary: int, room: int, render: Callable[[list[dict]], str] | None
) -> Ask:
    """Of `/v1/chat/completions`; `render` makes a prompt of messages. Otherwise as `read_completion`."""
    given = _fields(body, _OF_CHAT)
    messages = _messages(given.get("messages"))
    if render is None:
        raise RequestError(
            "this checkpoint has no chat template: ask /v1/completions", code="no_chat_template", param="messages"
        )
    prompt = _call("messages", lambda: render(messages))
    tokens = tuple(_call("messages", lambda: tokenizer.encode(prompt, add_special=False)))
    prompts, _ = _prompts(list(tokens), tokenizer, vocabulary, "messages")
    if "max_completion_tokens" in given:
        if "max_tokens" in given:
            raise RequestError("one of max_tokens and max_completion_tokens is wanted", param="max_tokens")
        given["max_tokens"] = given["max_completion_tokens"]
    logprobs = given.get("top_logprobs", 0) if _flag(given, "logprobs") else None
    if logprobs is None and given.get("top_logprobs"):
        raise RequestError("top_logprobs wants logprobs: true", param="top_logprobs")
    sampling = _sampling(given, len(tokens), room, max(1, room - len(tokens)), logprobs, "top_logprobs")
    return Ask(is_chat=True, prompts=prompts, samplings=_choices(given, sampling, 1), echo=(), **_stream_fields(given))


def usage(n_prompt: int, n_made: int) -> dict[str, int]:
    """Numbers of tokens."""
    return {"prompt_tokens": n_prompt, "completion_tokens": n_made, "total_tokens": n_prompt + n_made}


def choice(ask: Ask, index: int, text: str, reason: str | None, logprobs: dict[str, Any] | None) -> dict[str, Any]:
    """An answer, whole or streamed."""
    content: dict[str, Any] = {"text": text}
    if ask.is_chat:
        message = {"content": text} if ask.is_streamed else {"role": "assistant", "content": text, "refusal": None}
        content = {"delta" if ask.is_streamed else "message": message if text or not ask.is_streamed else {}}
    return {"index": index, **content, "logprobs": logprobs, "finish_reason": reason}


def show_logprobs(
    ask: Ask, logprobs: Sequence[Logprobs], tokenizer: Tokenizer, offset: int
) -> dict[str, Any] | None:  # fmt: skip
    """Log probabilities in the form of the endpoint; `offset` counts characters before the first token."""
    if ask.samplings[0].logprobs is None:
        return None
    if ask.is_chat:
        return {"content": [_of_chat(one, tokenizer) for one in logprobs], "refusal": None}
    names = [_name(one.token, tokenizer) for one in logprobs]
    offsets = []
    for one in logprobs:
        offsets.append(offset)
        offset += len(tokenizer.decode([one.token]))
    return {
        "tokens": names,
        "token_logprobs": [one.logprob for one in logprobs],
        "top_logprobs": [{_name(token, tokenizer): value for token, value in one.top} for one in logprobs],
        "text_offset": offsets,
    }


def _of_chat(one: Logprobs, tokenizer: Tokenizer) -> dict[str, Any]:
    def entry(token: int, value: float) -> dict[str, Any]:
        return {"token": _name(token, tokenizer), "logprob": value, "bytes": _bytes(token, tokenizer)}

    return {**entry(one.token, one.logprob), "top_logprobs": [entry(*pair) for pair in one.top]}


def _name(token: int, tokenizer: Tokenizer) -> str:
    """A token's text; of one that is a part of a character its bytes, as OpenAI writes them, else its number."""
    text = tokenizer.decode([token])
    if text and "\ufffd" not in text:
        return text
    bytes_ = _bytes(token, tokenizer)
    return f"token:{token}" if bytes_ is None else "bytes:" + "".join(f"\\x{byte:02x}" for byte in bytes_)


def _bytes(token: int, tokenizer: Tokenizer) -> list[int] | None:
    if isinstance(tokenizer, Bytes):
        return [token] if token < 256 else []
    text = tokenizer.decode([token])
    return None if "\ufffd" in text else list(text.encode())


def _fields(body: Any, known: set[str]) -> dict[str, Any]:
    """What was given, null left out: a field that is not built or unknown is refused, since it might matter."""
    if not isinstance(body, Mapping):
        raise RequestError(f"the body is {shown(body)}, wanted a JSON object")
    for name, value in body.items():
        if name in _NOT_BUILT and name in known:
            if value not in _NOT_BUILT[name]:
                raise RequestError(f"{name} is {shown(value)}, which is not built", param=name, code="unsupported")
        elif name not in known and name not in _WITHOUT_EFFECT:
            raise RequestError(f"{shown(name)} is no field of this request", param=str(name)[:80], code="unknown_field")
    return {name: value for name, value in body.items() if value is not None and name not in _NOT_BUILT}


def _flag(given: Mapping[str, Any], name: str) -> bool:
    value = given.get(name, False)
    if not isinstance(value, bool):
        raise RequestError(f"{name} is {shown(value)}, wanted true or false", param=name)
    return value


def _stream_fields(given: Mapping[str, Any]) -> dict[str, Any]:
    is_streamed, options = _flag(given, "stream"), given.get("stream_options", {})
    if not isinstance(options, Mapping) or options.keys() - {"include_usage", "include_obfuscation"}:
        raise RequestError(f"stream_options is {shown(options)}, wanted include_usage", param="stream_options")
    if options and not is_streamed:
        raise RequestError("stream_options wants stream: true", param="stream_options")
    return {"is_streamed": is_streamed, "has_usage": _flag(options, "include_usage")}


def _prompts(
    value: Any, tokenizer: Tokenizer, vocabulary: int, param: str = "prompt"
) -> tuple[tuple[tuple[int, ...], ...], tuple[str, ...]]:
    """Token ids and text of each prompt, which is a text, a list of them, token ids, or a list of those."""
    many = value if isinstance(value, list) and value and not all(map(_is_int, value)) else [value]
    if len(many) > MOST_CHOICES:
        raise RequestError(f"{param} has {len(many)} prompts, wanted at most {MOST_CHOICES}", param=param)
    rows, texts = [], []
    for one in many:
        if isinstance(one, str):
            tokens = _call(param, functools.partial(tokenizer.encode, one))
        elif isinstance(one, list) and all(map(_is_int, one)):
            tokens = one
        else:
            raise RequestError(f"{param} is {shown(one)}, wanted text or token ids, or a list of them", param=param)
        bad = next((token for token in tokens if not 0 <= token < vocabulary), None)
        if bad is not None:
            raise RequestError(f"{param} has token {bad}, wanted 0 to {vocabulary - 1}", param=param)
        if not tokens:
            raise RequestError(f"{param} is empty, wanted at least one token", param=param)
        rows.append(tuple(tokens))
        texts.append(one if isinstance(one, str) else tokenizer.decode(tokens))
    return tuple(rows), tuple(texts)


def _messages(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise RequestError(f"messages is {shown(value)}, wanted a list of at least one", param="messages")
    messages = []
    for i, one in enumerate(value):
        if not isinstance(one, Mapping) or not isinstance(one.get("role"), str):
            raise RequestError(f"messages[{i}] is {shown(one)}, wanted role and content", param="messages")
        content = one.get("content")
        if isinstance(content, list):
            if not all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
                raise RequestError(f"messages[{i}] has parts that are not text: not built", param="messages")
            content = "".join(str(part.get("text", "")) for part in content)
        if not isinstance(content, str):
            raise RequestError(f"messages[{i}].content is {shown(content)}, wanted text", param="messages")
        messages.append({**one, "content": content})
    return messages


def _sampling(
    given: Mapping[str, Any], n_prompt: int, room: int, default: int, logprobs: Any, param: str
) -> Sampling:  # fmt: skip
    n_new = given.get("max_tokens", default)
    if n_prompt >= room or (_is_int(n_new) and n_prompt + n_new > room):
        raise RequestError(
            f"this model's maximum context length is {room} tokens; the prompt has {n_prompt}, and {shown(n_new)} are "
            "wanted after it",
            param="max_tokens" if n_prompt < room else "prompt", code="context_length_exceeded",
        )  # fmt: skip
    stop = given.get("stop", ())
    stop = (stop,) if isinstance(stop, str) else stop
    if isinstance(stop, list) and len(stop) > MOST_STOPS:
        raise RequestError(f"stop has {len(stop)} texts, wanted at most {MOST_STOPS}", param="stop")
    fields = {
        "max_tokens": n_new, "temperature": given.get("temperature", 1.0), "top_p": given.get("top_p", 1.0),
        "top_k": max(given["top_k"], 0) if _is_int(given.get("top_k")) else given.get("top_k", 0),
        "min_p": given.get("min_p", 0.0), "seed": given.get("seed", random.getrandbits(31)), "stop": stop,
        "stop_ids": given.get("stop_token_ids", ()), "ignore_eos": given.get("ignore_eos", False), "logprobs": logprobs,
    }  # fmt: skip
    names = {"stop_ids": "stop_token_ids", "logprobs": param}
    for name, value in fields.items():  # one by one, to name the field
        _call(names.get(name, name), functools.partial(Sampling, **{name: value}))
    return Sampling(**fields)


def _choices(given: Mapping[str, Any], sampling: Sampling, n_prompts: int) -> tuple[Sampling, ...]:
    """The answers of a prompt differ by their seeds: that of the request, and those after it."""
    n = given.get("n", 1)
    if not _is_int(n) or not 1 <= n <= MOST_CHOICES // n_prompts:
        most = MOST_CHOICES // n_prompts
        raise RequestError(f"n is {shown(n)}, wanted 1 to {most} answers a prompt", param="n")
    return tuple(dataclasses.replace(sampling, seed=_wrapped(sampling.seed + i)) for i in range(n))


def _wrapped(seed: int) -> int:
    return (seed + 2**63) % 2**64 - 2**63


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _call(param: str, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except ValueError as error:
        raise RequestError(str(error).removeprefix("Sampling: "), param=param) from error
