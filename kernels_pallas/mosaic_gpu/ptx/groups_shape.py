"""What the texts of a row of groups depend on, and where in shared memory its parts lie."""

import dataclasses

from hisa_jax.kernels_pallas.mosaic_gpu.ptx.threshold_text import Shape

TOKENS = 32  # sort keys of tokens that a thread holds
_CANDIDATES = 16384  # that the last list has room for


@dataclasses.dataclass(frozen=True, kw_only=True)
class Groups:
    """The static numbers of a row.

    Attributes:
        maxima: the row of groups, of which a thread has shape.each.
        size: tokens a group, 2, 4 or 8.
        n_ctas: that share a row.
        has_sort_keys: whether those of the chosen are written, too, to $SORT_KEYS.
    """

    maxima: Shape
    size: int
    n_ctas: int = 1
    has_sort_keys: bool = False

    def __post_init__(self):
        shape = self.maxima
        if self.n_ctas > 1 and (shape.each * self.size > TOKENS or self.n_ctas * shape.n_warps % 32):
            raise ValueError(
                f"{self}: a CTA of several must have room for all its tokens, and whole warps for all warps"
            )

    @property
    def chunk(self) -> int:
        """Neighbouring tokens that a lane loads at a time."""
        return min(self.size, 4)

    @property
    def groups_a_load(self) -> int:
        """That a warp loads at a time."""
        return 32 * self.chunk // self.size

    @property
    def n_loads(self) -> int:
        return TOKENS // self.chunk

    @property
    def most_groups(self) -> int:
        """That can be listed."""
        return self.maxima.n_warps * self.groups_a_load * self.n_loads

    @property
    def most_candidates(self) -> int:
        return _CANDIDATES

    @property
    def list(self) -> int:
        """Where in shared memory groups are listed; after them candidates, their sort keys and columns."""
        return self.maxima.keys

    @property
    def candidates(self) -> int:
        return self.list + 4 * self.most_groups

    @property
    def table(self) -> int:
        """Where the CTAs of a row tell each other their ranges; then 32 sums of bins; then how many candidates."""
        return self.candidates + 8 * self.most_candidates

    @property
    def sums(self) -> int:
        return self.table + 8 * self.all_warps

    @property
    def counts(self) -> int:
        return self.sums + 128 * self.n_ctas

    @property
    def all_warps(self) -> int:
        return self.n_ctas * self.maxima.n_warps

    @property
    def smem_bytes(self) -> int:
        return self.table if self.n_ctas == 1 else self.counts + 4 * self.all_warps
