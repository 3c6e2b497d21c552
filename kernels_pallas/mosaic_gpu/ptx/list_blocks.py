"""What a part of a query lists, its blocks and their pages, by one warp: in PTX.

As arrays that XLA makes before, lists cost a launch, 1 to 2 us of a decoding step. Here they cost a wait for the ids
and one for the pages.
"""

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

from jax import Array
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu

from hisa_jax.kernels_pallas.mosaic_gpu.ptx.inline import REF, SPLAT, Row, address_of, scope
from hisa_jax.kernels_pallas.types import Ref

OPERANDS = ("IDS", "COLUMN", "VISIBLE", "FIRST", "META", "TABLE", "PAGES")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lists:
    """The static numbers of a part.

    Attributes:
        n_ids: blocks that a query lists; `n_own`: a part; `m`: words for them, of which the last ones may be -1.
        block_size: tokens of a block; `tile_s`: of a tile, `columns`: of as many tiles as are scored at a time.
        n_tiles: how many tiles each part has; None: those of its blocks.
        keeps_all: where a query sees so many tokens or fewer, it has no tiles.
        n_sequences: of that many the query's is listed at $FIRST, and begins `apart` blocks after the one before; None:
            its first block is listed there.
        n_listed: words for pages, a multiple of 32; 0: keys are in one piece.
        per_block: pages of a block, a power of two; `n_table`: words of the table; `n_pages`: pages there are.
    """

    n_ids: int
    n_own: int
    m: int
    block_size: int
    tile_s: int
    columns: int
    n_tiles: int | None
    keeps_all: int = 0
    n_sequences: int | None = None
    apart: int = 0
    n_listed: int = 0
    per_block: int = 1
    n_table: int = 0
    n_pages: int = 0


class Kept(NamedTuple):
    """What the lists of queries are made of, arrays in device memory."""

    ids: Ref  # [T, n] int32, blocks of each query
    visible: Ref  # [T] int32, tokens that it sees
    first: Ref  # [T] int32, first block of its sequence, or which sequence that is
    table: Ref | None  # [n] int32, the page of every group of rows


def list_ptx(lists: Lists) -> str:
    """Writes ids, then how many tiles, what the query sees and its first block, to $META; pages to $PAGES.

    $IDS is the row of the query, of which the part begins at $COLUMN.
    """
    chunks, pages = range(-(-lists.m // 32)), range(lists.n_listed // 32)
    registers = f""".reg .pred p; .reg .b32 lane, t, at, n, visible, first, zero, id<{len(chunks) + 1}>;
.reg .b32 page<{len(pages) + 1}>; .reg .b64 word;"""
    n_tiles = f"mov.b32 n, {lists.n_tiles};"
    if lists.n_tiles is None:
        n_tiles = f"""mad.lo.u32 n, n, {lists.block_size}, {lists.columns - 1}; div.u32 n, n, {lists.columns};
mul.lo.u32 n, n, {lists.columns // lists.tile_s}; setp.le.s32 p, visible, {lists.keeps_all}; @p mov.b32 n, 0;"""
    find = ""
    if lists.n_sequences is not None:
        find = f"min.s32 first, first, {lists.n_sequences - 1}; mul.lo.s32 first, first, {lists.apart};"
    text = f"""{registers}
mov.u32 lane, %laneid; mov.b32 n, 0; mov.b32 zero, 0; mov.b64 word, $VISIBLE; ld.global.b32 visible, [word];
mov.b64 word, $FIRST; ld.global.b32 first, [word];
{_join(_load_id(lists, u) for u in chunks)}
{find}
{_join(f"setp.ge.s32 p, id{u}, 0; vote.sync.ballot.b32 t, p, -1; popc.b32 t, t; add.s32 n, n, t;" for u in chunks)}
{_join(_load_page(lists, i) for i in pages)}
shl.b32 at, lane, 2; add.u32 at, at, $META;
{_join(_store_id(lists, u) for u in chunks)}
{n_tiles}
mov.b32 at, $META; setp.eq.u32 p, lane, 0; @p st.shared.v4.b32 [at+{4 * lists.m}], {{n, visible, first, zero}};
{_join(_store_page(lists, i) for i in pages)}
bar.warp.sync -1;
"""
    return scope(text, OPERANDS)


def _join(lines: Iterable[str]) -> str:
    return "\n".join(lines)


def _load_id(lists: Lists, u: int) -> str:
    return f"""add.u32 at, lane, {32 * u}; setp.lt.u32 p, at, {lists.n_own}; add.u32 t, at, $COLUMN;
setp.lt.and.u32 p, t, {lists.n_ids}, p; mul.wide.u32 word, t, 4; add.s64 word, word, $IDS;
mov.b32 id{u}, -1; @p ld.global.b32 id{u}, [word];"""


def _store_id(lists: Lists, u: int) -> str:
    return f"setp.lt.u32 p, lane, {lists.m - 32 * u}; @p st.shared.b32 [at+{128 * u}], id{u};"


def _load_page(lists: Lists, i: int) -> str:
    """The pages of a block are neighbours in a list: lanes ask the one that has its id."""
    each = lists.per_block
    u, first = 32 * i // each // 32, 32 * i // each % 32
    block = f"mov.b32 t, {first}; add.u32 t, t, at; shfl.sync.idx.b32 t, id{u}, t, 31, -1; max.s32 t, t, 0;"
    if 32 * u >= lists.m:
        block = "mov.b32 t, 0;"
    return f"""shr.u32 at, lane, {each.bit_length() - 1}; {block} add.s32 t, t, first; and.b32 at, lane, {each - 1};
mad.lo.s32 t, t, {each}, at; min.u32 t, t, {lists.n_table - 1}; mul.wide.u32 word, t, 4; add.s64 word, word, $TABLE;
ld.global.b32 page{i}, [word];"""


def _store_page(lists: Lists, i: int) -> str:
    return f"""max.s32 page{i}, page{i}, 0; min.s32 page{i}, page{i}, {lists.n_pages - 1};
shl.b32 at, lane, 2; add.u32 at, at, $PAGES; st.shared.b32 [at+{128 * i}], page{i};"""


def list_blocks(lists: Lists, kept: Kept, query: Array, part: Array, meta: Row, pages: Row | None) -> None:
    """Makes the lists of a part of a query, on a warp. `meta`, `pages`: rows of shared memory."""
    ptx, n_ids = list_ptx(lists), lists.n_ids
    refs = [kept.ids, kept.visible, kept.first, meta.ref] + ([] if pages is None else [kept.table, pages.ref])

    @plgpu.inline_mgpu(arg_types=(*(REF for _ in refs), SPLAT, SPLAT, SPLAT))
    def run(_ctx, ids, visible, first, meta_ref, *rest):
        *paged, query, column, slot = rest
        query, column, slot = (x.registers.item() for x in (query, column, slot))
        of_pages = [utils.memref_ptr(paged[0]), address_of(paged[1], slot, pages.width)] if pages else []
        utils.inline_ptx(
            ptx,
            address_of(ids, query, n_ids),
            column,
            address_of(visible, query, 1),
            address_of(first, query, 1),
            address_of(meta_ref, slot, meta.width),
            *of_pages,
            has_side_effects=True,
            convergent=True,
        )

    run(*refs, query, part * lists.n_own, meta.row)
