"""What the text of a scoring loop depends on."""

import dataclasses

KEYS_PER_WARPGROUP = 128
_N_HEADS = 64  # heads a product, at most


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """What the loop's text depends on."""

    H: int  # heads of a query, or of a group
    row_bytes: int  # of a key or a head: 64, 128 or 256
    n_parts: int
    is_e4m3: bool
    ring: int
    has_scale: bool
    keep_first: int
    keep_last: int
    out_columns: int
    filters: bool  # by THRESHOLDS: only sort keys above are stored, and MASKS tell which
    together: int = 1  # queries whose heads lie side by side in a slot: they share a product
    pitch: int | None = None  # bytes from a key, its parts in one piece, to the next; None: swizzled, part by part
    rows: int | None = None  # heads of a query where a slot holds a group of queries; None: all, a slot is one query
    n_linear: int = 0  # of `rows`, the first ones, which are added without relu
    n_rows: int = 0  # of `rows` that count; the others are left out: 0 times infinity is NaN
    maxima_of: int = 0  # neighbouring columns, a power of two up to 32, whose greatest sort key is written, too

    @property
    def n(self) -> int:
        """Columns of a product."""
        return min(self.columns, _N_HEADS)

    @property
    def columns(self) -> int:
        """Heads of a slot."""
        return self.together * self.H

    @property
    def group(self) -> int:
        """Queries of a group."""
        return 1 if self.rows is None else self.H // self.rows

    @property
    def queries(self) -> int:
        """Queries of a slot."""
        return self.group * self.together

    @property
    def w_words(self) -> int:
        """Words of a slot's weights, a multiple of the 128 bytes that copies go to; see score_groups_text.py."""
        return max(self.columns, 32) if self.rows is None else 2 * self.H

    @property
    def pin_words(self) -> int:
        """Words a thread stores to keep a wait in its place."""
        return 2 * self.together if self.rows is None else 32 // self.rows

    @property
    def steps(self) -> int:
        """Products of 32 bytes a part."""
        return self.row_bytes // 32

    @property
    def line(self) -> int:
        """Bytes of a row side by side in shared memory; eight rows of them are a swizzled tile."""
        return min(self.row_bytes, 128)

    @property
    def tile_bytes(self) -> int:
        """Shared memory of a tile of keys."""
        return KEYS_PER_WARPGROUP * (self.pitch or self.n_parts * self.row_bytes)

    @property
    def units(self) -> list[tuple[int, int]]:
        """(half of the keys, run of heads) in the order in which products are made: accumulators alternate."""
        return [(half, heads) for heads in range(self.columns // self.n) for half in range(2)]
