"""What a query does not see never changes a bit of its result: calls in which all of that holds zeros, NaN or infinity.

A call has its arrays, a mask of what the rows that are compared do not see, and those rows. A backend's tests run it
with zeros there, then with each poison. Rows whose own queries, weights and keys are NaN have a defined result, too:
every score counts as -inf, so the lowest positions win.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import hisa_jax as hj
from hisa_jax.page_pool import PagePool
from tests import draw


def _nan(shape: tuple[int, ...]) -> np.ndarray:
    return np.full(shape, np.nan, np.float32)


def _infinity(shape: tuple[int, ...]) -> np.ndarray:
    """Of one sign a row: sums of some are infinite, and NaN where signs meet."""
    of_row = np.where(np.arange(shape[0 if len(shape) == 1 else -2]) % 3, np.inf, -np.inf).astype(np.float32)
    return np.broadcast_to(of_row if len(shape) == 1 else of_row[:, None], shape)


POISONS = {"nan": _nan, "infinity": _infinity}


@dataclasses.dataclass(frozen=True)
class Call:
    """A selection of which some inputs may be anything.

    Attributes:
        arrays: its arguments, a pytree; `unseen`: of the same structure, bool masks.
        run: arguments -> `Selection`, its rows in front.
        rows: [...] bool, which rows of the result see nothing of the unseen.
        nan: [...] int32, of rows that are NaN altogether where the unseen are: how many tokens they see; 0 elsewhere.
    """

    arrays: Any
    unseen: Any
    run: Callable[..., hj.Selection]
    rows: np.ndarray
    nan: np.ndarray

    def poisoned(self, poison: str | None) -> Any:
        """The arguments with zeros (None) or a poison where they are unseen; integers get their largest value."""

        def fill(x: Any, mask: Any) -> Any:
            if not np.any(mask):
                return jnp.asarray(x)
            mask, dtype = jnp.asarray(mask), x.dtype
            if poison is None:
                filling = jnp.zeros(x.shape, dtype)
            elif jnp.issubdtype(dtype, jnp.integer):
                filling = jnp.full(x.shape, jnp.iinfo(dtype).max, dtype)
            else:
                filling = jnp.asarray(POISONS[poison](x.shape)).astype(dtype)
            return jnp.where(mask, filling, jnp.asarray(x))

        return jax.tree.map(fill, self.arrays, self.unseen)


def assert_isolated(call: Call, method: hj.Method, poisons: tuple[str, ...] = tuple(POISONS)) -> None:
    wanted = jax.tree.map(np.asarray, call.run(*call.poisoned(None)))
    assert wanted.count[call.rows].min() > 0
    for poison in poisons:
        got = jax.tree.map(np.asarray, call.run(*call.poisoned(poison)))
        for field in dataclasses.fields(hj.Selection):
            x, y = getattr(got, field.name), getattr(wanted, field.name)
            if x is not None:
                np.testing.assert_array_equal(x[call.rows], y[call.rows], err_msg=f"{field.name}, {poison}")
        if poison == "nan":
            for at in zip(*np.nonzero(call.nan), strict=True):
                chosen = chosen_of_nan(method, int(call.nan[at]))
                np.testing.assert_array_equal(got.indices[at][: got.count[at]], chosen, err_msg=f"NaN at {at}")


def chosen_of_nan(method: hj.Method, visible: int) -> np.ndarray:
    """What is chosen where every score is NaN: the lowest, beside the blocks that are always kept."""
    tokens = np.arange(visible)
    if isinstance(method, hj.Dsa):
        return tokens[: method.topk]
    eligible = -(-visible // method.block_size)
    kept = np.arange(eligible)
    if eligible > method.block_topk:
        kept = np.append(kept[: method.block_topk - method.keep_last], kept[-method.keep_last :])
    return tokens[np.isin(tokens // method.block_size, kept)][: method.topk]


def _keys(k: np.ndarray, dtype: str) -> Any:
    """As arguments: an array, or quantised."""
    return (
        draw.quantized(k, dtype, "float32") if dtype in ("float8_e4m3fn", "int8") else jnp.asarray(draw.cast(k, dtype))
    )


def _mask_of_keys(keys: Any, unseen: np.ndarray) -> Any:
    """[..., S] bool -> masks of an array [..., S, D], or of values and scales."""
    if isinstance(keys, hj.QuantizedKeys):
        return hj.QuantizedKeys(_mask_of_keys(keys.values, unseen), unseen)
    return np.broadcast_to(unseen[..., None], keys.shape)


def batch(
    select: Callable[..., hj.Selection], method: hj.Method, dtype: str, *, first_unseen: int = 261, S: int = 330
) -> Call:
    """Two sequences; the second, and of the first some queries and the keys from `first_unseen` on, are unseen."""
    B, T, H, D = 2, 6, 16, 64
    q, k, w = draw.inputs(B, T, S, H, D)
    positions, lengths = np.array([[-1, 40, 100, 200, 260, 128], [329, 0, -1, 64, 250, 300]]), np.array([261, 301])
    visible = np.minimum(positions + 1, lengths[:, None])
    is_nan = np.array([[True, False, False, True, False, False], [True] * T])
    keys = _keys(k, dtype)
    unseen_keys = np.array([np.arange(S) >= first_unseen, np.full(S, True)])

    def run(q: Any, keys: Any, w: Any) -> hj.Selection:
        return select(
            q, keys, w, method, query_positions=jnp.asarray(positions, jnp.int32),
            lengths=jnp.asarray(lengths, jnp.int32), return_scores=True, return_blocks=method.has_blocks,
        )  # fmt: skip

    q = jnp.asarray(draw.cast(q, dtype))
    masks = np.broadcast_to(is_nan[..., None, None], q.shape), np.broadcast_to(is_nan[..., None], w.shape)
    return Call(
        arrays=(q, keys, jnp.asarray(w)),
        unseen=(masks[0], _mask_of_keys(keys, unseen_keys), masks[1]),
        run=run,
        rows=~is_nan & (visible > 0) & (visible <= first_unseen),
        nan=np.where(is_nan, visible, 0),
    )


def packed(select_packed: Callable[..., hj.Selection], method: hj.Method, dtype: str) -> Call:
    """Five sequences, one after the other, of which two are unseen, and rows after the last."""
    n_queries, lengths = [3, 9, 1, 2, 1], [300, 270, 290, 17, 65]
    is_poisoned = np.array([False, True, False, True, False])
    T, N = sum(n_queries) + 3, sum(lengths) + 40
    q, k, w = (x[0] for x in draw.inputs(1, T, N, 16, 64))
    sequence_of_rows = np.repeat(np.arange(6), [*n_queries, 3])
    unseen_rows = np.append(is_poisoned, True)[sequence_of_rows]
    unseen_keys = np.append(is_poisoned, True)[np.repeat(np.arange(6), [*lengths, 40])]
    cu_q, cu_k = (jnp.asarray(np.cumsum([0, *x]), jnp.int32) for x in (n_queries, lengths))
    visible = np.concatenate([n - m + 1 + np.arange(m) for m, n in zip(n_queries, lengths, strict=True)] + [[0] * 3])
    keys, q = _keys(k, dtype), jnp.asarray(draw.cast(q, dtype))

    def run(q: Any, keys: Any, w: Any) -> hj.Selection:
        options = dict(return_scores=True, return_blocks=method.has_blocks)
        return select_packed(q, keys, w, cu_q, cu_k, method, **options)

    masks = np.broadcast_to(unseen_rows[:, None, None], q.shape), np.broadcast_to(unseen_rows[:, None], w.shape)
    return Call(
        arrays=(q, keys, jnp.asarray(w)),
        unseen=(masks[0], _mask_of_keys(keys, unseen_keys), masks[1]),
        run=run,
        rows=~unseen_rows,
        nan=np.where(unseen_rows, visible, 0),
    )


def paged(
    select_paged: Callable[..., hj.Selection],
    method: hj.Method,
    dtype: str,
    *,
    page_size: int,
    n_queries: tuple[int, ...] = (4, 9, 1, 2),
    lengths: tuple[int, ...] = (300, 270, 290, 33),
    H: int = 16,
    D: int = 64,
    n_devices: int = 1,
    stripe: int | None = None,
) -> Call:
    """Four requests in pages, of which the second is unseen, as are other pages and what is past a request's tokens.

    Entries of the tables without tokens are -1, which stands for page 0 where it is read: nobody reads that one. Pages
    are spread over devices as by `PagePool`.
    """
    is_poisoned = np.array([False, True, False, False])
    rng, n_used = np.random.default_rng(0), -(-np.array(lengths) // page_size)
    pool = PagePool(n_devices * (n_used.sum() // n_devices + 8), page_size, n_devices=n_devices, stripe=stripe)
    pool.add("nobody")
    pool.extend("nobody", 1)
    for r in range(4):
        pool.add(r)
    for r in rng.permutation(np.repeat(np.arange(4), n_used)).tolist():
        pool.extend(r, min(page_size, lengths[r] - pool.lengths[r]))
    T, n_pages, tables = sum(n_queries) + 2, pool.n_pages, jnp.asarray(pool.table(range(4), n_used.max() + 2))
    q, k, w = (x[0] for x in draw.inputs(1, T, sum(lengths), H, D))
    offsets, cu_q = (jnp.asarray(np.cumsum([0, *x]), jnp.int32) for x in (lengths, n_queries))
    cache = hj.init_cache(n_pages, page_size, D, dtype, sketch=getattr(method, "sketch", None))
    cache = hj.append(cache, _keys(k, dtype), tables, offsets, jnp.zeros(4, jnp.int32))
    is_seen = np.zeros((n_pages, page_size), bool)
    for r in np.flatnonzero(~is_poisoned):
        for nth in range(n_used[r]):
            is_seen[tables[r, nth], : lengths[r] - nth * page_size] = True

    def mask(name: str, leaf: Any) -> Any:
        if name in ("keys", "scales", "codes", "code_scales"):
            return np.broadcast_to(~is_seen.reshape(is_seen.shape + (1,) * (leaf.ndim - 2)), leaf.shape)
        if name in ("sums", "means", "mean_scales"):
            return np.broadcast_to(~is_seen.any(1).reshape((-1,) + (1,) * (leaf.ndim - 1)), leaf.shape)
        return np.zeros(leaf.shape, bool)

    masks = dataclasses.replace(
        cache,
        **{name: mask(name, getattr(cache, name)) for name in arrays_of(cache) if getattr(cache, name) is not None},
    )
    unseen_rows = np.append(is_poisoned, True)[np.repeat(np.arange(5), [*n_queries, 2])]
    q = jnp.asarray(draw.cast(q, dtype))
    visible = [n - m + 1 + np.arange(m) for m, n in zip(n_queries, lengths, strict=True)]

    def run(q: Any, w: Any, cache: hj.IndexCache) -> hj.Selection:
        options = dict(return_scores=True, return_blocks=method.has_blocks)
        return select_paged(q, w, cache, tables, cu_q, jnp.asarray(lengths, jnp.int32), method, **options)

    of_rows = np.broadcast_to(unseen_rows[:, None, None], q.shape), np.broadcast_to(unseen_rows[:, None], w.shape)
    return Call(
        arrays=(q, jnp.asarray(w), cache),
        unseen=(*of_rows, masks),
        run=run,
        rows=~unseen_rows,
        nan=np.where(unseen_rows, np.concatenate([*visible, [0, 0]]), 0),
    )


PAGE, LATENT = 16, 24
Append = Callable[..., hj.IndexCache]


class Written:
    """Requests 0 and 1 of 21 and 27 tokens in pages of 16, written by an implementation of `append`."""

    tables = jnp.array([[4, 1, 6], [2, 5, 7]], jnp.int32)

    def __init__(self, append: Append, dtype: str) -> None:
        self._append, rng = append, np.random.default_rng(0)
        # Powers of two for scales: no product is rounded, so no compiler can fuse it with a sum.
        self.k = _keys(rng.normal(size=(60, 64)), dtype)
        self.latents = jnp.asarray(rng.normal(size=(60, LATENT)), jnp.bfloat16)
        empty = hj.init_cache(8, PAGE, 64, dtype, sketch="int4", latent_dim=LATENT)
        self.cache = self.append(empty, [0, 21, 48], [0, 0])

    def append(self, cache: hj.IndexCache, cu_seqlens: list[int], lengths: list[int], nan: Any = ()) -> hj.IndexCache:
        """Appends of the 60 new tokens those that offsets name, of which some rows are NaN."""
        k, latents = jax.tree.map(lambda x: x.at[jnp.asarray(nan, jnp.int32)].set(jnp.nan), (self.k, self.latents))
        arrays = self.tables, jnp.asarray(cu_seqlens, jnp.int32), jnp.asarray(lengths, jnp.int32)
        return self._append(cache, k, *arrays, latents=latents)


def arrays_of(cache: hj.IndexCache) -> list[str]:
    """The fields that are arrays, or None."""
    return [field.name for field in dataclasses.fields(cache) if not field.metadata.get("static")]


def assert_same_pages(got: hj.IndexCache, wanted: hj.IndexCache, pages: list[int], *, present: bool = False) -> None:
    """Bit for bit what some pages hold; of keys, sketches and latents only tokens that are `present`, if so asked."""
    there = np.arange(PAGE)[None] < np.asarray(wanted.counts)[pages][:, None]
    for name in arrays_of(wanted):
        x, y = getattr(got, name), getattr(wanted, name)
        if x is None:
            continue
        x, y = (np.asarray(leaf)[pages].view(f"uint{8 * leaf.dtype.itemsize}") for leaf in (x, y))
        if present and name in ("keys", "scales", "codes", "code_scales", "latents"):
            x, y = x[there], y[there]
        np.testing.assert_array_equal(x, y, err_msg=name)


def assert_nan_stays_in_its_page(append: Append, dtype: str) -> None:
    """Appended to request 0 it changes no page of request 1, no unused one, and none of request 0 that was full."""
    written = Written(append, dtype)
    sizes, before = [0, 9, 14], [21, 27]  # 9 tokens from page 1 to page 6, 5 to page 5
    wanted = written.append(written.cache, sizes, before)
    got = written.append(written.cache, sizes, before, nan=range(9))
    assert_same_pages(got, wanted, [0, 2, 3, 4, 5, 7])
    assert np.isnan(np.asarray(got.sums)[[1]]).all() and got.counts.tolist() == wanted.counts.tolist()
    for x, y in zip(*((cache.keys[1, :5], cache.latents[1, :5]) for cache in (got, written.cache)), strict=True):
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))  # the tokens before


def assert_removed_nan_leaves_no_trace(append: Append, dtype: str) -> None:
    """Tokens of NaN truncated, or overwritten, or copied elsewhere before: pages are as if they never were there."""
    written, used = Written(append, dtype), [4, 1, 6, 2, 5]
    wanted = written.append(written.cache, [0, 13, 16], [21, 27])
    spoilt = written.append(written.cache, [0, 20, 23], [21, 27], nan=range(23))
    truncated = hj.truncate(
        spoilt, written.tables, jnp.array([41, 30], jnp.int32), jnp.array([21, 27], jnp.int32), max_tokens=20
    )
    assert_same_pages(truncated, written.cache, [4, 1, 2, 5], present=True)
    assert not np.asarray(truncated.sums[6]).any() and truncated.counts[6] == 0
    for cache in (truncated, spoilt):
        assert_same_pages(written.append(cache, [0, 13, 16], [21, 27]), wanted, used, present=True)
    copied = hj.copy_pages(spoilt, jnp.array([4, 1], jnp.int32), jnp.array([6, 3], jnp.int32))
    assert_same_pages(copied, spoilt, [0, 1, 2, 4, 5, 7])
    of_truncated = hj.copy_pages(truncated, jnp.array([1, 5], jnp.int32), jnp.array([0, 6], jnp.int32))
    moved = jax.tree.map(lambda x: x.at[jnp.array([1, 5])].set(x[jnp.array([0, 6])]), of_truncated)
    assert_same_pages(moved, written.cache, [1, 5], present=True)
