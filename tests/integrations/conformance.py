"""The contract's promises, run on the reference functions of other projects: the table of docs/conformance.md.

    python -m tests.integrations.conformance tokamax | tpu_inference | sglang_jax

in the project's environment (`make test-integrations`). Each function is called by what it takes; nothing is mended on
the way.
"""

import argparse
import functools
import importlib.util
import pathlib
import types
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

import hisa_jax as hj
from hisa_jax import testing
from tests.integrations.installed import SITE, SOURCE, namespace

METHOD = hj.Dsa(topk=4)
PAGE = 8  # tokens
TAKES = ("lengths",)  # queries are the last tokens of a sequence


class Peer(NamedTuple):
    """A project's function: of its module one that `check_contract` can call, its form, the promises that it breaks."""

    adapter: Callable[[object], Callable[..., np.ndarray]]
    form: testing.Form
    broken: tuple[str, ...]


class Paged(NamedTuple):
    """A call in the layout that the three share: packed queries, pages in order, one table."""

    q: np.ndarray
    w: np.ndarray
    pages: np.ndarray
    lengths: np.ndarray
    tables: np.ndarray
    cu_q: np.ndarray
    distribution: np.ndarray


def paged(q, k, w, lengths=None) -> Paged:
    """[B, T, H, D], [B, S, D], [B, T, H] -> the same, with room for topk keys at least, as a server has."""
    (B, T), (S, D) = q.shape[:2], k.shape[1:]
    capacity = -(-max(S, METHOD.topk) // PAGE) * PAGE
    pages = np.zeros((B, capacity, D), k.dtype)
    pages[:, :S] = k
    n_decodes = B if T == 1 else 0
    return Paged(
        q.reshape(-1, *q.shape[2:]), w.reshape(-1, w.shape[2]), pages.reshape(-1, PAGE, D),
        np.full(B, S, np.int32) if lengths is None else lengths,
        np.arange(B * capacity // PAGE, dtype=np.int32), np.arange(0, B * T + 1, T, dtype=np.int32),
        np.array([n_decodes, n_decodes, B], np.int32),
    )  # fmt: skip


def rows(given, q) -> np.ndarray:
    return np.asarray(given).reshape(*q.shape[:2], METHOD.topk)


def tokamax(module) -> Callable[..., np.ndarray]:
    """Keys in e4m3, each with the scale 1: what the cache holds is what is judged."""

    def select(q, k, w, lengths=None):
        call, D = paged(q, k, w, lengths), k.shape[2]
        records = np.zeros((len(call.pages), PAGE, 256), np.uint8)
        records[..., :D] = call.pages.view(np.uint8)
        records[..., 128] = 127  # 2^0
        given = module.lightning_indexer(
            jnp.asarray(call.q, jnp.float32), jnp.asarray(call.w), jnp.asarray(records.reshape(-1, PAGE // 4, 4, 256)),
            *map(jnp.asarray, (call.lengths, call.tables, call.cu_q, call.distribution)), k=METHOD.topk,
            implementation="xla",
        )  # fmt: skip
        return rows(given, q)

    return select


def tpu_inference(module) -> Callable[..., np.ndarray]:
    """The NumPy function that its kernel is tested against."""

    def select(q, k, w, lengths=None):
        call, T = paged(q, k, w, lengths), q.shape[1]
        given = module.streamindex_topk_ref(
            call.q, call.w, call.pages[:, :, None], call.tables.reshape(len(q), -1), [T] * len(q),
            call.lengths.tolist(), call.cu_q, METHOD.topk, 1, q.shape[2], 1,
        )  # fmt: skip
        return rows(given, q)

    return select


def sglang_jax(module, *, is_decode: bool = False) -> Callable[..., np.ndarray]:
    """Its path in plain JAX; `is_decode`: one query a sequence."""

    def select(q, k, w, lengths=None):
        call = paged(q, k, w, lengths)
        pages_per_seq = len(call.tables) // len(q)
        starts = np.arange(len(q) + 1, dtype=np.int32) * pages_per_seq * PAGE
        given = module.streamindex_topk_ref(
            *map(jnp.asarray, (call.q, call.w, call.pages, call.lengths, call.tables, call.cu_q, starts)),
            jnp.asarray(call.distribution), k=METHOD.topk, pages_per_seq=pages_per_seq, one_token_per_seq=is_decode,
        )  # fmt: skip
        return rows(given, q)

    return select


_UNORDERED = functools.partial(testing.Form, takes=TAKES, order="any")
PEERS = {
    "tokamax": {"tokamax 0.0.17": Peer(tokamax, _UNORDERED(dtype="float8_e4m3fn"), ("nan", "clipping"))},
    "tpu_inference": {
        "tpu-inference 0.32.0": Peer(tpu_inference, _UNORDERED(), ("ties", "nan", "infinity", "clipping"))
    },
    "sglang_jax": {
        "sglang-jax cddbf6f": Peer(sglang_jax, _UNORDERED(), ("nan", "infinity", "clipping")),
        "the same, decode": Peer(
            functools.partial(sglang_jax, is_decode=True),
            _UNORDERED(sizes={"T": (1,)}),
            ("nan", "infinity", "clipping"),
        ),
    },
}


def module_of(project: str) -> types.ModuleType:
    """The module that has the project's function."""
    if project == "tokamax":
        import tokamax.ops

        return tokamax.ops
    if project == "tpu_inference":
        namespace("tpu_inference")
        return _load(SITE / "tests/kernels/deepseek_v4/test_streamindex_topk.py")
    return _load(SOURCE / "python/sgl_jax/srt/kernels/dsa/ref.py")


def _load(file: pathlib.Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(f"installed_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def surprises(project: str) -> list[testing.Verdict]:
    """The verdicts on a project that `PEERS`, and so the page, has not."""
    module, found = module_of(project), []
    for peer in PEERS[project].values():
        for verdict in testing.check_promises(peer.adapter(module), METHOD, form=peer.form):
            if (verdict.outcome == "broken") != (verdict.promise in peer.broken):
                found.append(verdict)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.integrations.conformance")
    parser.add_argument("project", choices=PEERS)
    project = parser.parse_args().project
    for name, peer in PEERS[project].items():
        function = peer.adapter(module_of(project))
        print(f"{name}, {METHOD}, {peer.form}")
        for verdict in testing.check_promises(function, METHOD, form=peer.form):
            print(f"  {verdict.promise:18} {verdict.outcome:10} {verdict.why}", flush=True)
            if verdict.outcome == "broken":
                show_small(function, peer, verdict.promise)


def show_small(function: Callable[..., np.ndarray], peer: Peer, promise: str) -> None:
    """Prints the smallest inputs that break a promise."""
    try:
        testing.check_contract(function, METHOD, form=peer.form, promises=[promise], seconds=20)
    except testing.ContractError as error:
        print(f"    {error}".replace("\n", "\n    "), flush=True)


if __name__ == "__main__":
    main()
