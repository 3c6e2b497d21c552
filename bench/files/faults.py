"""Faults in the files of a checkpoint, one at a time: made by a generator, the same for the same seed.

Each is a fault by what the formats say, not by what the loader checks: a value of another type or beyond every model's,
text that is not JSON, a header that does not describe its file, a name that leads out of the folder.
"""

import dataclasses
import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

CONFIG, INDEX, TOKENIZER = "config.json", "model.safetensors.index.json", "tokenizer.json"
SHARD = "model-00001-of-00002.safetensors"
OUTSIDE = "outside.safetensors"
_INFINITE = (float("nan"), float("inf"), float("-inf"))
_HUGE = (10**9, 10**12, 10**30)
_ANYWHERE: tuple[Any, ...] = (None, "48", "", [], {}, [[]], {"a": 1})

# Values that are wrong for a key of each kind; or, like null, no fault: then the model must be the same.
_WRONG: dict[str, tuple[Any, ...]] = {
    "size": (*_ANYWHERE, True, False, 48.0, 48.5, -1, 0, *_HUGE, *_INFINITE),
    "number": (*_ANYWHERE, True, False, -1, 10**30, 1e300, *_INFINITE),
    "flag": (*_ANYWHERE, 0, 1, 48.5, "true", float("nan")),
    "name": (*_ANYWHERE, 48, True, "silu\0", "x" * 10**5),
    "list": (*_ANYWHERE, 3, True, "dense", [1, 1, 1], [None], ["dense"], [["dense"]] * 3, ["full", "dense", "what"]),
    "object": ([], "48", "", [[]], 3, True, [["rope_type", "yarn"]]),
}
_KEYS = {
    "size": (
        "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
        "num_attention_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
        "index_n_heads", "index_head_dim", "index_topk", "n_routed_experts", "n_shared_experts", "num_experts_per_tok",
        "n_group", "topk_group", "max_position_embeddings", "num_nextn_predict_layers", "first_k_dense_replace",
        "index_topk_freq", "index_skip_topk_offset", "eos_token_id", "hisa_k_block_size", "hisa_block_topk",
    ),
    "number": ("routed_scaling_factor", "rms_norm_eps", "lora_norm_eps", "index_norm_eps", "rope_theta"),
    "flag": (
        "norm_topk_prob", "rope_interleave", "indexer_rope_interleave", "tie_word_embeddings", "attention_bias",
        "mlp_bias", "index_hadamard", "use_hisa",
    ),
    "name": ("model_type", "hidden_act", "scoring_func", "topk_method", "index_key_dtype", "index_key_scale"),
    "list": ("mlp_layer_types", "indexer_types", "index_topk_pattern"),
    "object": ("rope_parameters", "rope_scaling", "quantization_config"),
}  # fmt: skip
_INNER = {
    "rope_parameters": {
        "number": ("rope_theta", "factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor"),
        "size": ("original_max_position_embeddings",),
        "flag": ("truncate",),
        "name": ("rope_type", "type"),
    },
    "quantization_config": {"list": ("weight_block_size",), "name": ("quant_method", "scale_fmt", "fmt")},
}


@dataclasses.dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        name: what it is.
        file: in which it is.
        make: puts it into a folder that holds a checkpoint in shards with an index, and a tokenizer.json.
        key: what an error must name beside the file; "" for the file alone.
    """

    name: str
    file: str
    make: Callable[[Path], Any]
    key: str = ""


def faults(seed: int) -> list[Fault]:
    """All faults; the seed places those that could be at any byte."""
    rng = random.Random(seed)
    found = [*_of_values(), *_of_header_and_index()]
    for file in (CONFIG, INDEX, TOKENIZER):
        found += _of_text(file, rng)
    return [*found, *_of_bytes(rng), *_of_places()]


def _of_values() -> Iterator[Fault]:
    for kind, names in _KEYS.items():
        for name in names:
            yield from (_value((name,), value) for value in _WRONG[kind])
    for outer, kinds in _INNER.items():
        for kind, names in kinds.items():
            for name in names:
                yield from (_value((outer, name), value) for value in _WRONG[kind])
    for value in (*_ANYWHERE, -1, 2**31, 1.5, [1, "2"], [True], [-1], [10**30]):
        yield _value(("eos_token_id",), value)


def _value(path: tuple[str, ...], value: Any) -> Fault:
    return Fault(f"{'.'.join(path)} = {value!r:.40}", CONFIG, _set(CONFIG, path, value), path[-1])


def _set(file: str, path: tuple[str, ...], value: Any) -> Callable[[Path], Any]:
    """Gives a key of a JSON object, or of an object in it, another value."""

    def change(keys: dict[str, Any]) -> None:
        for name in path[:-1]:
            keys = keys.setdefault(name, {})
        keys[path[-1]] = value

    return lambda folder: edit_json(folder / file, change)


def _of_text(file: str, rng: random.Random) -> Iterator[Fault]:
    """Text that is not JSON, or JSON of another shape."""

    def put(data: bytes) -> Callable[[Path], Any]:
        return lambda folder: (folder / file).write_bytes(data)

    def insert(share: float, data: bytes) -> Callable[[Path], Any]:
        def change(folder: Path) -> None:
            text = (folder / file).read_bytes().strip()
            # Never whole: a text cut at its end, or with a byte after it, may be no fault.
            at = int(share * (len(text) - 1)) + (1 if data else 0)
            (folder / file).write_bytes(text[:at] + data + (text[at:] if data else b""))

        return change

    texts = {
        "empty": b"", "a list": b"[]", "a number": b"1", "a string": b'"a"', "null": b"null", "not closed": b"{",
        "UTF-16": '{"a": 1}'.encode("utf-16"), "a byte-order mark": b"\xef\xbb\xbf{}", "no UTF-8": b'{"a": "\xff"}',
        "lists in lists": b"[" * 10**5, "objects in objects": b'{"a":' * 10**5,
        "nested and closed": b'{"a":' + b"[" * 10**5 + b"]" * 10**5 + b"}",
        "an int of 5000 digits": b'{"a": ' + b"9" * 5000 + b"}", "zeros": bytes(1000),
        "a key twice": b'{"model_type": "a", "model_type": "a", "weight_map": {}, "weight_map": {}}',
    }  # fmt: skip
    yield from (Fault(f"{file}: {name}", file, put(text)) for name, text in texts.items())
    # Sparse: it takes no room on the disk.
    yield Fault(f"{file}: 3 GB", file, lambda folder: os.truncate(folder / file, 3 * 10**9))
    for _ in range(10):
        share = rng.random()
        yield Fault(f"{file}: cut at {share:.3f}", file, insert(share, b""))
        yield Fault(f"{file}: a NUL at {share:.3f}", file, insert(share, b"\0"))
        yield Fault(f"{file}: a byte ff at {share:.3f}", file, insert(share, b"\xff"))


def _of_header_and_index() -> Iterator[Fault]:
    tensor = "model.norm.weight"
    items: list[Any] = [None, [], "a", 3, True, {}, {"dtype": "BF16"}]
    for name, values in {
        "dtype": (None, 5, "", "f32", "F16", "I32", "I64", "BOOL", "U8", "F8_E8M0", "../x", ["BF16"], "x" * 10**5),
        "shape": (
            None, 48, "48", [], [-48], [47], [48.0], [True], ["48"], [[48]], [2**63], [10**30], [48] * 10**5, [1] * 65,
            [48] + [1] * 7, [6, 8], [0], [2**32, 2**32], {"0": 48},
        ),
        "data_offsets": (None, [], [0], [0, 1, 2], [-1, 79], [80, 0], [0, 2**63], [0, 10**30], [0.0, 192.0],
                         [True, 193], "0, 80", [0, 80], [1, 81], {"a": 0}),
    }.items():  # fmt: skip
        items += [{name: value} for value in values]
    for item in items:
        yield Fault(f"header: {tensor} = {item!r:.50}", SHARD, _entry(tensor, item), tensor)
    others: tuple[Any, ...] = (None, [], "a", 3, {})
    for value in others:
        yield Fault(f"index: weight_map = {value!r}", INDEX, _set(INDEX, ("weight_map",), value))
    places: tuple[Any, ...] = (
        None, 5, True, [], {}, "", ".", "..", "/", f"../{OUTSIDE}", f"./../{OUTSIDE}", f"x/../../{OUTSIDE}",
        "/etc/passwd", "a/b.safetensors", "C:\\x.safetensors", "..\\x.safetensors", "a\0.safetensors",
        "\ud800.safetensors", "x" * 10**5 + ".safetensors", "gone.safetensors", "config.json", "~/x.safetensors",
        "file:///x.safetensors",
    )  # fmt: skip
    for place in places:
        key = "" if place == "gone.safetensors" else tensor
        yield Fault(f"index: {tensor} is in {place!r:.40}", INDEX, _set(INDEX, ("weight_map", tensor), place), key)
    packed = "model.layers.1.mlp.experts.gate_up_proj"
    for shape in ([10**12, 2, 0], [2**16, 2, 0], [0, 0, 0], [0], [2, 0]):
        entry = {"dtype": "BF16", "shape": shape, "data_offsets": [0, 0]}
        yield Fault(f"header: packed experts {shape}", SHARD, _entry(packed, entry), "mlp.experts.")


def _entry(tensor: str, item: Any) -> Callable[[Path], Any]:
    """Changes a tensor's entry in the header and names it in the index."""

    def change(header: dict[str, Any]) -> None:
        known = header.get(tensor, {})
        header[tensor] = {**known, **item} if isinstance(item, dict) and item else item

    def make(folder: Path) -> None:
        edit_header(folder / SHARD, change)
        edit_json(folder / INDEX, lambda keys: keys["weight_map"].update({tensor: SHARD}))

    return make


def _of_bytes(rng: random.Random) -> Iterator[Fault]:
    """Bytes of a shard's header, of the size before it, and of the index."""
    for size in (0, 1, 2**20, 2**31, 2**63, 2**64 - 1):

        def resize(folder: Path, size: int = size) -> None:
            data = (folder / SHARD).read_bytes()
            (folder / SHARD).write_bytes(size.to_bytes(8, "little") + data[8:])

        yield Fault(f"header of {size} bytes", SHARD, resize)
    for size in (0, 7, 8, 9, 100, -1):

        def cut(folder: Path, size: int = size) -> None:
            os.truncate(folder / SHARD, size if size >= 0 else (folder / SHARD).stat().st_size + size)

        yield Fault(f"shard cut to {size} bytes", SHARD, cut)
    yield Fault("shard of 3 GB", SHARD, lambda folder: os.truncate(folder / SHARD, 3 * 10**9))
    yield Fault("shard of zeros", SHARD, lambda folder: (folder / SHARD).write_bytes(bytes(1000)))
    # Nothing but one value over and over, as many times as a header may have bytes: what does that take to hold?
    for value in (b"[", b"[],", b'{"b":1},', b'"ab",', b"999,", b"1e5,", b" "):

        def fill(folder: Path, value: bytes = value) -> None:
            room = 2**25 - 12
            text = (b'{"a":[' + value * (room // len(value)) + b"0]}").ljust(2**25)
            (folder / SHARD).write_bytes(len(text).to_bytes(8, "little") + text)

        yield Fault(f"a header of 32 MiB of {value!r}", SHARD, fill)
    for file in (SHARD, INDEX):
        for _ in range(60):
            share, byte, how = rng.random(), rng.randrange(256), rng.choice(("replaced", "left out", "put in"))

            def mutate(folder: Path, file: str = file, share: float = share, byte: int = byte, how: str = how) -> None:
                data = (folder / file).read_bytes()
                # In a shard only the header: a tensor of other numbers is as good as any.
                end = 8 + int.from_bytes(data[:8], "little") if file == SHARD else len(data)
                at = int(share * end)
                middle = b"" if how == "left out" else bytes([byte])
                (folder / file).write_bytes(data[:at] + middle + data[at + (how != "put in") :])

            yield Fault(f"{file}: byte {byte} {how} at {share:.4f}", file, mutate)


def _of_places() -> Iterator[Fault]:
    """Something else where a file should be."""

    def replace(file: str, make: Callable[[Path], Any]) -> Callable[[Path], Any]:
        def change(folder: Path) -> None:
            (folder / file).unlink()
            make(folder / file)

        return change

    # Reading a pipe that has no writer, or /dev/zero, would never end.
    for file in (CONFIG, INDEX, TOKENIZER, SHARD):
        yield Fault(f"{file}: a folder", file, replace(file, Path.mkdir))
        yield Fault(f"{file}: a pipe", file, replace(file, os.mkfifo))
        yield Fault(f"{file}: a link to a device", file, replace(file, lambda path: path.symlink_to("/dev/zero")))
    for file in (CONFIG, SHARD):
        yield Fault(f"{file}: missing", file, replace(file, lambda path: None))
        yield Fault(f"{file}: a link to nothing", file, replace(file, lambda path: path.symlink_to("nothing")))
        yield Fault(f"{file}: a link to itself", file, replace(file, lambda path: path.symlink_to(path)))
    model: dict[str, Any]
    for model in (
        {"type": "WordLevel", "vocab": {"a": -1}, "unk_token": "a"}, {"type": "WordLevel", "vocab": {"a": 1.5}},
        {"type": "WordLevel", "vocab": {"a": 2**40}, "unk_token": "a"}, {"type": "What"}, {"type": "WordLevel"},
        {"type": "BPE", "vocab": {}, "merges": ["a b"]}, {"type": "BPE", "vocab": None, "merges": None},
        {"type": "Unigram", "vocab": [], "unk_id": 7},
    ):  # fmt: skip
        yield Fault(f"tokenizer: model = {model}", TOKENIZER, _set(TOKENIZER, ("model",), model))


def edit_json(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrites a JSON object."""
    keys = json.loads(file.read_text())
    change(keys)
    file.write_text(json.dumps(keys))


def edit_header(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrites the header of a safetensors file and leaves what follows."""
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
