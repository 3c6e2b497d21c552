"""Requests to select for, and what each form is called with for them."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import NDArray

from bench.fuzz import forms as fuzz_forms
from bench.fuzz.setups import Setup
from tests import oracle

Array = NDArray[Any]
COPIES = 4  # pages that are copied in the life of a cache
PADDING = 3  # rows after those of all requests in packed batches


class Call(NamedTuple):
    """A form with its arguments."""

    form: str
    args: tuple[Any, ...]
    options: dict[str, Any]


class Found(NamedTuple):
    """What a form selects for each query [R, T, ..]; `leaked`: rows of padding that select something."""

    indices: Array
    counts: Array
    scores: Array
    blocks: Array | None
    leaked: int


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)  # one is itself alone, so that runs are remembered
class Scene:
    """R requests: keys in one piece, and queries that are the last of the tokens, or at any position.

    Attributes:
        seed: of what judges and layouts draw.
        data: how the values were drawn, in words.
        q, k, scales, w: [R, T, H, D], [R, S, D], [R, S] or None, [R, T, H], of the setup's dtypes.
        n_q, n_k: [R] queries and keys of each request.
        positions: [R, T] of queries anywhere; None: the n_q queries are the last of the n_k tokens.
        exact_tokens, exact_blocks: whether float32 has these scores to the last bit.
    """

    setup: Setup
    seed: int
    data: str
    q: Array
    k: Array
    scales: Array | None
    w: Array
    n_q: Array
    n_k: Array
    positions: Array | None
    exact_tokens: bool
    exact_blocks: bool

    @property
    def forms(self) -> list[str]:
        """Those that have these requests."""
        setup = self.setup
        forms = ["select"]
        if setup.is_split:
            forms.append("select_on_mesh")
        if self.positions is None:
            forms.append("select_packed")
            if setup.page_size:
                forms += ["select_paged"] + (["select_paged_on_mesh"] if setup.devices > 1 else [])
        return forms

    @property
    def is_row(self) -> Array:
        """[R, T] bool: which rows are queries."""
        R, T = self.setup.R, self.setup.T
        return (
            np.broadcast_to(np.arange(T) < self.n_q[:, None], (R, T))
            if self.positions is None
            else np.ones((R, T), bool)
        )

    @property
    def query_positions(self) -> Array:
        """[R, T] int32."""
        if self.positions is not None:
            return self.positions
        tail = self.n_k[:, None] - self.n_q[:, None] + np.arange(self.setup.T)
        return np.where(self.is_row, np.maximum(tail, -1), -1).astype(np.int32)

    @property
    def visible(self) -> Array:
        """[R, T]: how many tokens each query sees."""
        lengths = np.clip(self.n_k, 0, self.setup.S)
        return np.maximum(np.minimum(self.query_positions.astype(np.int64) + 1, lengths[:, None]), 0)

    def chunk(self, start: Array, end: Array) -> "Scene":
        """The requests when their queries start .. end - 1 [R] were the last."""
        q, w = np.zeros_like(self.q), np.zeros_like(self.w)
        for r, (a, b) in enumerate(zip(start, end, strict=True)):
            q[r, : b - a], w[r, : b - a] = self.q[r, a:b], self.w[r, a:b]
        n_q = (end - start).astype(np.int32)
        # Of more queries than tokens the first have negative positions: those that stay keep theirs.
        n_k = self.n_k - (self.n_q - end)
        n_q = np.where(n_k < 0, 0, n_q).astype(np.int32)
        return dataclasses.replace(self, q=q, w=w, n_q=n_q, n_k=np.maximum(n_k, 0).astype(np.int32))

    def reference(self) -> oracle.OracleSelection:
        """The oracle's selection, with the tolerance of each score."""
        keys: Any = self.k if self.scales is None else Keys(self.k, self.scales)
        return oracle.select(self.q, keys, self.w, self.setup.method, self.query_positions, self.n_k)


class Keys(NamedTuple):
    values: Array
    scales: Array


@functools.lru_cache(maxsize=32)
def run(scene: Scene, form: str, filler: float | None = None, *, method: Any = None) -> Found:
    """Runs a form, once. `filler`: value of all that no query sees; None: whatever was drawn there."""
    return run_again(scene, form, filler, method=method)


def run_again(scene: Scene, form: str, filler: float | None = None, *, method: Any = None) -> Found:
    """As `run`, but nothing is remembered."""
    return by_request(scene, form, made(call_of(scene, form, filler, method=method)))


def by_request(scene: Scene, form: str, got: Any) -> Found:
    """A selection of what the form has as rows -> [R, T, ..]."""
    arrays = [got.indices, got.count, got.scores, got.blocks]
    if form in ("select", "select_on_mesh"):
        return Found._make([*arrays, 0])
    n = int(scene.n_q.sum())
    return Found._make([*(_unpacked(scene, x) for x in arrays), int(np.sum(got.count[n:] != 0))])


recorded: list[Call] | None = None  # calls since a list was put here


def made(call: Call) -> Any:
    """The result of a call, on the host."""
    if recorded is not None:
        recorded.append(call)
    return jax.device_get(fuzz_forms.FORMS[call.form](*call.args, **call.options))


def call_of(scene: Scene, form: str, filler: float | None = None, *, method: Any = None) -> Call:
    """What a form is called with."""
    setup = scene.setup
    options = dict(method=method or setup.method, implementation=setup.implementation)
    if form.endswith("_on_mesh"):
        form, options = form.removesuffix("_on_mesh"), options | dict(devices=setup.devices)
    if form == "select":
        q, w, k, scales = scene.q, scene.w, scene.k, scene.scales
        if filler is not None:
            is_key = np.arange(setup.S) < scene.n_k[:, None]
            q, w = filled(q, scene.visible > 0, filler), filled(w, scene.visible > 0, filler)
            k, scales = filled(k, is_key, filler), None if scales is None else filled(scales, is_key, filler)
        return Call(form, (q, k, scales, w, scene.query_positions, scene.n_k), options)
    q, w = (packed(x, scene.n_q, setup.R * setup.T + PADDING, filler) for x in (scene.q, scene.w))
    if form == "select_packed":
        keys = (None if x is None else packed(x, scene.n_k, setup.R * setup.S, filler) for x in (scene.k, scene.scales))
        return Call(form, (q, *keys, w, offsets(scene.n_q), offsets(scene.n_k)), options)
    n_pages, tables, life = _life(scene, filler)
    options |= dict(n_pages=n_pages, page_size=setup.page_size)
    return Call(form, (q, w, tables, offsets(scene.n_q), scene.n_k, *life), options)


def _life(scene: Scene, filler: float | None) -> tuple[int, Array, tuple[Any, ...]]:
    """Pages of the cache, tables before and after copies, and what `fuzz_forms.written` does; see there."""
    setup, rng = scene.setup, np.random.default_rng(scene.seed)
    assert setup.page_size
    R, S, size = setup.R, setup.S, setup.page_size
    P = -(-S // size) + 1  # one more than there can be
    first = rng.integers(0, scene.n_k + 1).astype(np.int32)
    junk = np.minimum(rng.integers(0, 2 * size + 2, R), S - first).astype(np.int32)
    second = scene.n_k - first

    # Each device has enough for all. A device has whole blocks of each request, in turn.
    own = R * P + COPIES + 3
    n_pages, free = setup.devices * own, [(rng.permutation(own) + d * own).tolist() for d in range(setup.devices)]

    def take(nth: int) -> int:
        return free[nth * size // max(setup.unit, size) % setup.devices].pop()

    tables = rng.choice([-1, n_pages, 2**31 - 1, -(2**31)], (2, R, P)).astype(np.int32)
    for r in range(R):
        for nth in range(-(-max(scene.n_k[r], first[r] + junk[r]) // size)):
            tables[:, r, nth] = take(nth)
    held = [(r, nth) for r in range(R) for nth in range(-(-int(scene.n_k[r]) // size))]
    source, target = np.zeros(COPIES, np.int32), np.full(COPIES, n_pages, np.int32)
    for i, which in enumerate(rng.permutation(len(held))[: rng.integers(0, COPIES + 1)]):
        r, nth = held[which]
        source[i], target[i] = tables[0, r, nth], take(nth)
        tables[1, r, nth] = target[i]
    is_stale = np.ones((n_pages, size), bool)
    for r, nth in held:
        is_stale[tables[1, r, nth], : scene.n_k[r] - nth * size] = False

    scales = scene.scales
    if scales is None and scene.k.dtype.itemsize == 1:
        scales = np.ones(scene.k.shape[:2], np.float32)
    order = rng.permutation(S)

    def keys(pick: Any, sizes: Array) -> tuple[Array, Array | None]:
        parts = (None if x is None else np.stack([pick(x[r], r) for r in range(R)]) for x in (scene.k, scales))
        values, its_scales = (None if x is None else packed(x, sizes, R * S, filler) for x in parts)
        assert values is not None
        return values, its_scales

    # Rejected tokens are tokens from elsewhere.
    new = keys(lambda x, r: np.concatenate([x[: first[r]], x[order][: S - first[r]]]), first + junk)
    rest = keys(lambda x, r: np.roll(x, -first[r], axis=0), second)
    stale = np.float32(1 if filler is None else bounded(filler, scene.k.dtype))
    return n_pages, tables, (new, rest, first, junk, second, source, target, is_stale, stale)


def offsets(sizes: Array) -> Array:
    """[R] -> [R + 1] int32."""
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)


def filled(x: Array, keep: Array, filler: float) -> Array:
    """x [a, b, ..] where `keep` [a, b], the filler elsewhere."""
    keep = keep.reshape(keep.shape + (1,) * (x.ndim - 2))
    return np.where(keep, x, np.asarray(bounded(filler, x.dtype)).astype(x.dtype))


def bounded(filler: float, dtype: Any) -> float:
    """What integers have for NaN."""
    return 127.0 if dtype == np.int8 and not np.isfinite(filler) else filler


def packed(x: Array, sizes: Array, total: int, filler: float | None = None) -> Array:
    """[R, n, ..], [R] -> [total, ..]: the first of each request, request after request, then padding."""
    value = 1.0 if filler is None else bounded(filler, x.dtype)
    rows = np.full((total, *x.shape[2:]), value).astype(x.dtype)
    at = offsets(sizes)
    for r, n in enumerate(sizes):
        rows[at[r] : at[r + 1]] = x[r, :n]
    return rows


def _unpacked(scene: Scene, found: Array | None) -> Any:
    """[total, ..] -> [R, T, ..], 0 in rows that are not queries."""
    if found is None:
        return None
    at, T = offsets(scene.n_q), scene.setup.T
    rows = np.zeros((scene.setup.R, T, *found.shape[1:]), found.dtype)
    for r, n in enumerate(scene.n_q):
        rows[r, :n] = found[at[r] : at[r + 1]]
    return rows
