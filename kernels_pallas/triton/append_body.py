"""Device code of `append`: one touched page a program."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from hisa_jax.kernels_pallas.triton.tree import sum_rows
from hisa_jax.kernels_pallas.types import Ref
from hisa_jax.xla.block_means import join, mark_of
from hisa_jax.xla.means import mean, split
from hisa_jax.xla.sketch import GROUP, HALF, packed_halves

_ROWS = 8  # copied or sketched at a time


class _Page(NamedTuple):
    """What a program does: int32 scalars."""

    page: Array  # which of the cache
    page_index: Array  # which of its sequence
    n_before: Array  # tokens that the page had
    n: Array  # tokens that it has now
    first: Array  # row of the new tokens that goes to the page's row 0, if that were new


def append_body(cu_seqlens_ref: Ref, lengths_ref: Ref, table_ref: Ref, *refs: Ref, treedef: Any) -> None:
    # One program, one touched page:   offsets -> request and page_index -> page -> its rows, old and new -> sum, mean
    #
    # Four loads that wait for each other. The page's old keys are read to take its sum anew, in the order of
    # `sum_rows`; only new keys are stored, and their sketches. `old` and `pages` are the same memory: a page belongs to
    # one program, which loads old rows and stores new ones. Where it ends a block, the program takes the mean of that:
    # sums of the block's other pages are those that they keep, or taken anew, too, if another program does so. in:
    # [R + 1], [R], [R, P], then the new tokens and the pages; out: the pages.
    (new, old), n_pages = jax.tree.unflatten(treedef, refs[: treedef.num_leaves]), refs[-1].shape[0]
    pages = jax.tree.unflatten(jax.tree.structure(old), refs[treedef.num_leaves :])
    size, T = old.keys.shape[1], new[0].shape[0]
    nth, r, is_one = _touched(cu_seqlens_ref, lengths_ref, size, T)
    begin, end, length = (plt.load(ref.at[at]) for ref, at in _of(cu_seqlens_ref, lengths_ref, r))
    begin, end = jnp.clip(begin, 0, T), jnp.clip(end, 0, T)
    page_index = (length >> _log2(size)) + nth

    def page_of(page_index: Array) -> tuple[_Page, Array]:
        """A page of this request; and whether there is one."""
        is_there = (page_index >= 0) & (page_index < table_ref.shape[1])
        page = plt.load(table_ref.at[r, jnp.where(is_there, page_index, 0)])
        is_there &= (page >= 0) & (page < n_pages)
        start = page_index * size
        at = _Page(
            page=page,
            page_index=page_index,
            n_before=jnp.clip(length - start, 0, size),
            n=jnp.clip(length + end - begin - start, 0, size),
            first=begin + start - length,
        )
        return at, is_there

    at, is_there = page_of(page_index)

    @pl.when(is_one & is_there)
    def _write():
        _write_keys(at, new, old, pages, page_of)
        if pages.codes is not None:
            _write_sketch(at, new[0], pages)
        if pages.latents is not None:
            for source_ref, target_ref in zip(*map(jax.tree.leaves, (new[2], pages.latents)), strict=True):
                _copy_rows(at, source_ref, target_ref)


def _of(cu_seqlens_ref: Ref, lengths_ref: Ref, r: Array) -> tuple:
    return (cu_seqlens_ref, r), (cu_seqlens_ref, r + 1), (lengths_ref, r)


def _touched(cu_seqlens_ref: Ref, lengths_ref: Ref, size: int, T: int) -> tuple[Array, Array, Array]:
    """This program's page: the nth that its request r touches; and whether there is one."""
    R, i, shift = lengths_ref.shape[0], pl.program_id(0), _log2(size)
    requests = jnp.arange(pl.next_power_of_2(R), dtype=jnp.int32)
    there = requests < R
    at = jnp.where(there, requests, 0)
    begin, end, length = (plt.load(ref.at[at]) for ref, at in _of(cu_seqlens_ref, lengths_ref, at))
    n_new = jnp.where(there, jnp.clip(end, 0, T) - jnp.clip(begin, 0, T), 0)
    last = length + n_new - 1
    n_touched = jnp.where(n_new > 0, (last >> shift) - (length >> shift) + 1, 0)
    ends = jnp.cumsum(n_touched)
    is_before = there & (ends <= i)
    r = jnp.sum(is_before.astype(jnp.int32))
    nth = i - jnp.sum(jnp.where(is_before, n_touched, 0))
    return nth, jnp.minimum(r, R - 1), r < R


def _write_keys(at: _Page, new: tuple, old: Any, pages: Any, page_of: Callable[[Array], tuple[_Page, Array]]) -> None:
    size = old.keys.shape[1]
    total = _sum_of(at, new, old, pages)
    pages.sums[at.page] = total
    pages.counts[at.page] = at.n
    pages.places[at.page] = at.page_index
    if pages.marks is None:
        _write_mean(at, mean(total, at.n), pages)
        return
    per_block = pages.block_size // size
    ends_block = at.page_index & (per_block - 1) == per_block - 1

    @pl.when(~ends_block)
    def _of_page():
        pages.marks[at.page] = mark_of(total, at.n)
        _write_mean(at, mean(total, at.n), pages)

    @pl.when(ends_block)
    def _of_block():
        block, whole, mark = _block_of(at, total, new, old, page_of, per_block)
        # The complement of what a reader compares with is never that.
        pages.marks[at.page] = jnp.where(whole, mark, ~mark)
        n = jnp.where(whole, per_block * size, at.n)
        _write_mean(at, mean(jnp.where(whole, block, total), n), pages)


def _sum_of(at: _Page, new: tuple, old: Any, pages: Any | None) -> Array:
    """[D] sum of a page's dequantised keys as they are from now on; stores the new ones to `pages`."""
    k_ref, k_scale_ref, _ = new
    columns = jnp.arange(k_ref.shape[1], dtype=jnp.int32)

    def load(rows: Array) -> Array:
        """Rows of the page as they are from now on, dequantised, zeros after the last."""
        is_old, is_new = rows < at.n_before, (rows >= at.n_before) & (rows < at.n)
        source = jnp.where(is_new, at.first + rows, 0)
        whole = lambda mask: jnp.broadcast_to(mask[:, None], (rows.shape[0], columns.shape[0]))  # noqa: E731
        old_keys = plt.load(old.keys.at[at.page, rows[:, None], columns[None, :]], mask=whole(is_old))
        new_keys = plt.load(k_ref.at[source[:, None], columns[None, :]], mask=whole(is_new))
        if pages is not None:
            plt.store(pages.keys.at[at.page, rows[:, None], columns[None, :]], new_keys, mask=whole(is_new))
        values = jnp.where(whole(is_new), new_keys.astype(jnp.float32), old_keys.astype(jnp.float32))
        if k_scale_ref is not None:
            old_scales = plt.load(old.scales.at[at.page, rows], mask=is_old)
            new_scales = plt.load(k_scale_ref.at[source], mask=is_new)
            if pages is not None:
                plt.store(pages.scales.at[at.page, rows], new_scales, mask=is_new)
            values = values * jnp.where(is_new, new_scales, old_scales)[:, None]
        # This select also keeps product and sum apart, which would be rounded once if they were one instruction.
        return jnp.where(whole(is_old | is_new), values, 0.0)

    return sum_rows(load, old.keys.shape[1])


def _block_of(
    at: _Page, total: Array, new: tuple, old: Any, page_of: Callable[[Array], tuple[_Page, Array]], per_block: int
) -> tuple[Array, Array, Array]:
    """[D] sum of the block that a page of sum `total` ends; whether all its pages are full; its other pages' marks."""
    size, levels = old.keys.shape[1], _log2(per_block)

    def add(sums: list[Array], i: Array, x: Array) -> list[Array]:
        """Sums of 1, 2, 4, ... pages that wait for as many more, and the i-th page: by pairs, as rows are added."""
        out, waits = [], jnp.bool_(True)
        for level, held in enumerate(sums):
            is_second = (i >> level) & 1 == 1
            out.append(jnp.where(waits & ~is_second, x, held))
            x, waits = jnp.where(waits & is_second, held + x, x), waits & is_second
        return [*out, x]

    def one(i: Array, state: tuple) -> tuple:
        sums, whole, mark = state
        other, is_there = page_of(at.page_index - (per_block - 1) + i)
        other = other._replace(page=jnp.where(is_there, other.page, 0))
        is_written = other.n_before < size

        def kept() -> tuple[Array, Array, Array]:
            return old.sums[other.page], old.counts[other.page], old.marks[other.page]

        def taken_anew() -> tuple[Array, Array, Array]:
            # Another program stores to this page. What is loaded here it leaves as it is.
            x = _sum_of(other, new, old, None)
            return x, other.n, mark_of(x, other.n)

        x, n, own = lax.cond(is_written, taken_anew, kept)
        *sums, _ = add(list(sums), i, x)
        return tuple(sums), whole & is_there & (n == size), join(mark, jnp.where(is_there, own, 0))

    state = (jnp.zeros_like(total),) * levels, at.n == size, jnp.int32(0)
    sums, whole, mark = lax.fori_loop(0, per_block - 1, one, state)
    return add(list(sums), jnp.int32(per_block - 1), total)[-1], whole, mark


def _write_mean(at: _Page, means: Array, pages: Any) -> None:
    """[D] float32 -> what the page keeps of it."""
    if pages.means is None:
        return
    parts, scale = split(means, pages.means.shape[1], pages.means.dtype)
    for part, rounded in enumerate(parts):
        pages.means[at.page, part] = rounded
    if scale is not None:
        pages.mean_scales[at.page] = scale


def _write_sketch(at: _Page, k_ref: Ref, pages: Any) -> None:
    """[T, D] -> the sketches of the new rows."""
    D, (n_bytes, n_groups) = k_ref.shape[1], (ref.shape[2] for ref in (pages.codes, pages.code_scales))
    columns, groups = (jnp.arange(n, dtype=jnp.int32)[None, :] for n in (n_bytes, n_groups))
    first = columns // HALF * GROUP + columns % HALF  # of the two numbers in a byte

    def some(rows: Array, source: Array, is_new: Array) -> None:
        def numbers(at: Array) -> Array:
            loaded = plt.load(k_ref.at[source, at], mask=is_new & (at < D), other=0.0)
            return loaded.astype(jnp.float32).reshape(_ROWS, n_groups, HALF)

        codes, scales = packed_halves(numbers(first), numbers(first + HALF))
        codes = codes.reshape(_ROWS, n_bytes).astype(jnp.uint8)
        plt.store(pages.codes.at[at.page, rows, columns], codes, mask=jnp.broadcast_to(is_new, codes.shape))
        plt.store(pages.code_scales.at[at.page, rows, groups], scales, mask=jnp.broadcast_to(is_new, scales.shape))

    _each_new(at, some)


def _copy_rows(at: _Page, source_ref: Ref, target_ref: Ref) -> None:
    """[T, E] -> the new rows of [n_pages, size, E]."""
    E = source_ref.shape[1]
    columns = jnp.arange(pl.next_power_of_2(E), dtype=jnp.int32)[None, :]

    def some(rows: Array, source: Array, is_new: Array) -> None:
        mask = is_new & (columns < E)
        values = plt.load(source_ref.at[source, columns], mask=mask)
        plt.store(target_ref.at[at.page, rows, columns], values, mask=mask)

    _each_new(at, some)


def _each_new(at: _Page, some: Callable[[Array, Array, Array], None]) -> None:
    """Calls `some` for a few rows of the page at a time, as far as there are new ones among them.

    It gets [n, 1] each: int32 rows of the page, those of the new tokens that go there, and bool, which are new.
    """

    def step(i: Array, _: None) -> None:
        rows = i * _ROWS + jnp.arange(_ROWS, dtype=jnp.int32)
        is_new = (rows >= at.n_before) & (rows < at.n)
        source = jnp.where(is_new, at.first + rows, 0)
        some(rows[:, None], source[:, None], is_new[:, None])

    lax.fori_loop(at.n_before >> _log2(_ROWS), (at.n + _ROWS - 1) >> _log2(_ROWS), step, None)


def _log2(n: int) -> int:
    return n.bit_length() - 1
