"""Sparse attention over lists in any order, with holes and repetitions: scenes, and what must hold of the result."""

import dataclasses
import functools
from typing import Any, NamedTuple

import numpy as np

from bench.fuzz.draw import DTYPES
from bench.fuzz.judges import Judge, Verdict, Wrong
from bench.fuzz.scene import PADDING, Array, Call, made, offsets
from bench.fuzz.setups import MlaSetup
from tests import oracle

# Relative to the largest value that a query attends to.
_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
_FORMS = ["sparse_mla", "sparse_mla_paged"]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class MlaScene:
    """R requests of T queries with their lists; the paged form has the first n_q [R] queries of each.

    Attributes:
        q, kv, sink: [R, T, N, Dk], [R, S, Dk], [N].
        indices: [R, T, K] int32, anything; numbers outside of the sequence count as -1.
        is_lost: [R, P] bool: pages that the table does not have.
    """

    setup: MlaSetup
    seed: int
    data: str
    q: Array
    kv: Array
    indices: Array
    sink: Array
    n_q: Array
    is_lost: Array

    @property
    def forms(self) -> list[str]:
        return _FORMS

    def rows(self, form: str) -> Array:
        """[R, T] bool: the queries that a form has."""
        T = self.setup.T
        return np.arange(T) < (self.n_q[:, None] if form == "sparse_mla_paged" else np.full((self.setup.R, 1), T))

    def listed(self, form: str) -> Array:
        """[R, T, K] int32: the lists, -1 where there is no such token."""
        setup, indices = self.setup, self.indices
        is_there = (indices >= 0) & (indices < setup.S)
        if form == "sparse_mla_paged":
            page = np.clip(indices // setup.page_size, 0, setup.pages - 1)
            is_there &= ~np.take_along_axis(self.is_lost[:, None], page, axis=2)
        return np.where(is_there, indices, -1)


class Attended(NamedTuple):
    """[R, T, N, value_dim] and [R, T, N] float32."""

    out: Array
    lse: Array


def scene(setup: MlaSetup, seed: int) -> MlaScene:
    """The same for the same setup and seed."""
    rng = np.random.default_rng(seed)
    R, T, S, K = setup.R, setup.T, setup.S, setup.K
    order = str(rng.choice(["ascending", "any order", "repeated", "outside", "few"]))
    indices = np.stack([[np.resize(rng.permutation(S), K) for _ in range(T)] for _ in range(R)])
    if order == "ascending":
        indices = np.sort(indices, axis=-1)
    elif order == "repeated":
        indices = rng.integers(0, rng.integers(1, S + 1), indices.shape)
    elif order == "outside":
        outside = rng.random(indices.shape) < 0.3
        indices[outside] = rng.choice([-2, -(2**31), S, S + 1, 2**31 - 1], indices.shape)[outside]
    elif order == "few":
        indices[..., rng.integers(1, 4) :] = -1
        indices = rng.permuted(indices, axis=-1)
    indices[rng.random(indices.shape) < rng.choice([0.0, 0.3, 0.95])] = -1
    indices[rng.random((R, T)) < 0.1] = -1
    # The paged form has no lengths: it would read an index beyond the sequence and within its pages.
    beyond = (indices >= S) & (indices < setup.pages * setup.page_size)
    indices = np.where(beyond, 2**31 - 1, indices).astype(np.int32)
    q = rng.normal(size=(R, T, setup.N, setup.key_dim)) * rng.choice([0.0, 1.0, 4.0])
    kv = rng.normal(size=(R, S, setup.key_dim))
    data = f"lists {order}"
    if rng.random() < 0.3:
        kv[rng.random((R, S)) < 0.05] = np.nan
        data += ", NaN in tokens"
    lost = (rng.random((R, setup.pages)) < 0.2) & (rng.random() < 0.3)
    return MlaScene(
        setup=setup,
        seed=int(rng.integers(2**31)),
        data=data,
        q=q.astype(DTYPES[setup.dtype]),
        kv=kv.astype(DTYPES[setup.dtype]),
        indices=indices,
        sink=rng.normal(size=setup.N).astype(np.float32) * 5 if rng.random() < 0.5 else np.full(setup.N, -np.inf, "f"),
        n_q=rng.choice([0, 1, T, int(rng.integers(T + 1))], R).astype(np.int32),
        is_lost=lost,
    )


@functools.lru_cache(maxsize=16)
def run(scene: MlaScene, form: str) -> Attended:
    """Runs a form, once."""
    return run_again(scene, form)


def run_again(scene: MlaScene, form: str) -> Attended:
    """As `run`, but nothing is remembered."""
    out, lse = made(call_of(scene, form))
    out = out.astype(np.float32)
    if form == "sparse_mla":
        return Attended(out, lse)
    rows = Attended(*(np.zeros((*scene.indices.shape[:2], *x.shape[1:]), np.float32) for x in (out, lse)))
    at = offsets(scene.n_q)
    for r, n in enumerate(scene.n_q):
        rows.out[r, :n], rows.lse[r, :n] = out[at[r] : at[r + 1]], lse[at[r] : at[r + 1]]
    return rows


def call_of(scene: MlaScene, form: str) -> Call:
    """What a form is called with."""
    setup, rng = scene.setup, np.random.default_rng(scene.seed)
    options: dict[str, Any] = dict(scale=setup.key_dim**-0.5, value_dim=setup.value_dim)
    options["implementation"] = setup.implementation
    if form == "sparse_mla":
        return Call(form, (scene.q, scene.kv, scene.indices, scene.sink), options)
    size, pages = setup.page_size, setup.pages
    table = rng.permutation(setup.n_pages)[: setup.R * pages].reshape(setup.R, pages).astype(np.int32)
    # Whatever no query lists is NaN, so that reading it shows.
    latents = np.full((setup.n_pages, size, setup.key_dim), np.nan).astype(scene.kv.dtype)
    for r in range(setup.R):
        padded = np.full((pages * size, setup.key_dim), np.nan).astype(scene.kv.dtype)
        padded[: setup.S] = scene.kv[r]
        latents[table[r]] = padded.reshape(pages, size, setup.key_dim)
    table = np.where(scene.is_lost, rng.choice([-1, setup.n_pages, 2**31 - 1], table.shape), table).astype(np.int32)
    q, indices = (
        np.concatenate([x[r, :n] for r, n in enumerate(scene.n_q)] + [x[0, :1]] * (setup.R * setup.T + PADDING))
        [: setup.R * setup.T + PADDING]
        for x in (scene.q, scene.indices)
    )  # fmt: skip
    return Call(form, (q, latents, indices, scene.sink, table, offsets(scene.n_q)), options)


def contract(scene: MlaScene, form: str) -> Verdict:
    """The oracle's softmax, a token listed twice counting twice."""
    setup, got, listed = scene.setup, run(scene, form), scene.listed(form)
    with np.errstate(all="ignore"):
        out, lse = oracle.sparse_mla(scene.q, scene.kv, listed, setup.value_dim, setup.key_dim**-0.5, scene.sink)
    tolerance = _TOLERANCE[setup.dtype]
    return _compare(scene.rows(form), got, Attended(out, lse), tolerance, "the oracle")


def order(scene: MlaScene, form: str) -> Verdict:
    """The same list in another order gives the same, up to rounding."""
    indices = np.random.default_rng(scene.seed).permuted(scene.indices, axis=-1)
    other = dataclasses.replace(scene, indices=indices)
    return _compare(
        scene.rows(form), run(other, form), run(scene, form), _TOLERANCE[scene.setup.dtype], "another order"
    )


def poison(scene: MlaScene, form: str) -> Verdict:
    """NaN and infinity in what no query lists changes no bit."""
    rng, listed, kv = np.random.default_rng(scene.seed), scene.listed(form), scene.kv.copy()
    value = rng.choice([np.nan, np.inf, -np.inf])
    for r in range(scene.setup.R):
        kv[r, np.setdiff1d(np.arange(scene.setup.S), listed[r])] = value
    other = dataclasses.replace(scene, kv=kv)
    return _compare(scene.rows(form), run(other, form), run(scene, form), 0.0, f"without {value} in unlisted tokens")


def own_lists(scene: MlaScene, form: str) -> Verdict:
    """NaN in what one query does not list changes no bit of that query, whatever the others list."""
    rng = np.random.default_rng(scene.seed)
    t, listed, kv = int(rng.integers(scene.setup.T)), scene.listed(form), scene.kv.copy()
    for r in range(scene.setup.R):
        kv[r, np.setdiff1d(np.arange(scene.setup.S), listed[r, t])] = np.nan
    rows = scene.rows(form) & (np.arange(scene.setup.T) == t)
    other = dataclasses.replace(scene, kv=kv)
    return _compare(rows, run(other, form), run(scene, form), 0.0, "without NaN in others' tokens")


def page_order(scene: MlaScene, form: str) -> Verdict:
    """Other pages: the same bits."""
    other = dataclasses.replace(scene, seed=scene.seed + 1)
    return _compare(scene.rows(form), run(other, form), run(scene, form), 0.0, "over other pages")


def repeat(scene: MlaScene, form: str) -> Verdict:
    """The same call gives the same bits."""
    return _compare(scene.rows(form), run_again(scene, form), run(scene, form), 0.0, "the same call before")


def _compare(rows: Array, got: Attended, wanted: Attended, tolerance: float, what: str) -> Verdict:
    wrong = []
    for r, t in np.argwhere(rows):
        for name, x, y in (("out", got.out[r, t], wanted.out[r, t]), ("lse", got.lse[r, t], wanted.lse[r, t])):
            finite = np.abs(y[np.isfinite(y)])
            slack = tolerance * max(1.0, float(finite.max(initial=0.0)))
            if not np.allclose(x, y, rtol=0, atol=slack, equal_nan=True):
                with np.errstate(invalid="ignore"):
                    at = np.unravel_index(np.argmax(np.nan_to_num(np.abs(x - y), nan=np.inf)), x.shape)
                where = f"{name}{[int(i) for i in at]}"
                wrong.append(Wrong(int(r), int(t), f"{where} is {x[at]:.9g}, not {y[at]:.9g}, that of {what}"))
                break
    return Verdict(int(rows.sum()), wrong)


def _is_paged(scene: MlaScene, form: str) -> bool:
    return form == "sparse_mla_paged"


JUDGES: dict[str, Judge] = {
    "oracle": Judge(contract),
    "order": Judge(order, share=0.4),
    "poison": Judge(poison, share=0.4),
    "own lists": Judge(own_lists, share=0.4),
    "pages": Judge(page_order, _is_paged, share=0.4),
    "repeat": Judge(repeat, share=0.1),
}
