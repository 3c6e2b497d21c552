"""Lighthouse as a value, and the pyramid that it makes of a sequence."""

import dataclasses
from typing import Literal, get_args

import jax

from hisa_jax.methods import at_least

Scorer = Literal["norm", "dilated"]
Rope = Literal["last", "before"]
Prefix = Literal["keep", "release"]
DILATION = 4  # classes of positions that the dilated scorer attends within


@dataclasses.dataclass(frozen=True)
class Pyramid:
    """Windows of pool**l tokens, l < levels, over `n_tokens`: their numbers, level by level, from the tokens up."""

    n_tokens: int
    levels: int
    pool: int

    @property
    def widths(self) -> tuple[int, ...]:
        """Tokens of a window, by level."""
        return tuple(self.pool**level for level in range(self.levels))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Windows, by level."""
        return tuple(self.n_tokens // width for width in self.widths)

    @property
    def starts(self) -> tuple[int, ...]:
        """Number of each level's first window."""
        return tuple(sum(self.sizes[:level]) for level in range(self.levels))

    @property
    def n_windows(self) -> int:
        return sum(self.sizes)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class Lighthouse:
    """Lighthouse attention: dense causal attention over the entries of a pyramid that a free score selects.

    Level l has the means of queries, keys and values over windows of pool**l tokens; an entry is one of them. All
    entries of the top level are present. In each tile of the sequence `tile` entries a level are picked, half by the
    scores of queries, half by those of keys, and the `pool` entries below a picked one are present, too. So T tokens
    become T / pool**(levels - 1) + (levels - 1) * pool * topk entries, for every input.

    The selection of a tile looks at all its tokens: a loss through it is for training alone.

    Attributes:
        levels: of the pyramid, L in the paper; 1 is dense attention.
        pool: windows of a level that make one of the next, p in the paper; a power of two.
        topk: entries picked for each selecting level, k in the paper; a multiple of `tile`.
        tile: entries picked of each tile and selecting level: there are topk / tile tiles. Even.
        scorer: "norm": l2 norms of queries and of keys. "dilated": of what causal attention among every fourth token
            gives, of (q, k, v) and of (k, q, v).
        rope: where an entry is rotated. "last": pooled first, then rotated at its last position. "before": rotated,
            then pooled, as in the paper's runs.
        prefix: "keep": the first pool**(levels - 1) - 1 tokens are entries, too, so that each position has an output.
            "release": not so, as in the released code; these positions may be 0.

    Raises: TypeError: a number that is not an int. ValueError: an attribute out of range.
    Source: Lighthouse Attention, arXiv 2605.06554, and its released code; "last" is its authors' later correction,
        "keep" of this library.
    """

    levels: int = 3
    pool: int = 4
    topk: int = 2048
    tile: int = 128
    scorer: Scorer = "norm"
    rope: Rope = "last"
    prefix: Prefix = "keep"

    def __post_init__(self) -> None:
        at_least(self, "levels", 1)
        at_least(self, "pool", 2)
        at_least(self, "tile", 2)
        at_least(self, "topk", 1)
        if self.pool & (self.pool - 1):
            raise ValueError(f"Lighthouse(pool={self.pool}): must be a power of two")
        if self.tile % 2:
            raise ValueError(f"Lighthouse(tile={self.tile}): must be even: half of it is picked by queries' scores")
        if self.topk % self.tile:
            raise ValueError(f"Lighthouse(topk={self.topk}): must be a multiple of tile = {self.tile}")
        if self.topk < 2 * self.pool:
            raise ValueError(f"Lighthouse(topk={self.topk}): must be at least 2 * pool = {2 * self.pool}")
        for name, values in (("scorer", Scorer), ("rope", Rope), ("prefix", Prefix)):
            value = getattr(self, name)
            if value not in get_args(values):
                raise ValueError(f"Lighthouse({name}={value!r}): must be one of {', '.join(get_args(values))}")

    @property
    def n_tiles(self) -> int:
        """Parts of the sequence in which entries are picked apart from each other."""
        return self.topk // self.tile

    @property
    def widest(self) -> int:
        """Tokens of a window of the top level."""
        return self.pool ** (self.levels - 1)

    def pyramid(self, n_tokens: int) -> Pyramid:
        """Its windows over so many tokens."""
        return Pyramid(n_tokens, self.levels, self.pool)

    def n_entries(self, n_tokens: int) -> int:
        """How many entries n_tokens become, the length of the dense attention.

        Raises: ValueError: a number of tokens that the method does not divide into its windows and tiles.
        """
        self.check_tokens("Lighthouse.n_entries", "n_tokens", n_tokens)
        selected = n_tokens // self.widest + (self.levels - 1) * self.pool * self.topk
        return selected + self.n_kept

    @property
    def n_kept(self) -> int:
        """Tokens at the start that are always present."""
        return self.widest - 1 if self.prefix == "keep" else 0

    def check_tokens(self, call: str, name: str, T: int) -> None:
        """Raises ValueError unless windows and tiles divide T tokens, an argument called `name`."""
        whole = f"{call}: {name} = {T}"
        if T < 1 or T % self.widest:
            raise ValueError(f"{whole}, wanted a multiple of pool ** (levels - 1) = {self.widest} of {self}")
        top = T // self.widest
        if top % self.n_tiles:
            raise ValueError(
                f"{whole}, wanted a multiple of {self.widest * self.n_tiles}: its {top} entries of the top level must "
                f"make topk / tile = {self.n_tiles} tiles of {self}"
            )
        n = top // self.n_tiles
        if n < self.tile or n % (self.tile // 2):
            raise ValueError(
                f"{whole}, which has {n} entries of the top level in a tile, wanted at least tile = {self.tile} and a "
                f"multiple of half of it, of {self}"
            )
