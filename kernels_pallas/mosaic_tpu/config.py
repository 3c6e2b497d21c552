"""What the TPU kernels know of the chips, and what is asked of them."""

import dataclasses

import jax

from hisa_jax.kernels_pallas.types import Interpret

SUBLANES = 8  # rows of a float32 register: queries side by side in every kernel
LANES = 128
GROUP = 16  # blocks that one copy of contiguous keys brings: the rows of a bfloat16 tile of means


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """What a choice of tile sizes depends on.

    Attributes:
        mxu: rows and columns of the matrix unit.
        n_cores: cores that share a grid (megacore).
    """

    mxu: int
    n_cores: int = 1


_V5E, _V5P, _V6E, _V7X = Chip(mxu=128), Chip(mxu=128, n_cores=2), Chip(mxu=256), Chip(mxu=256)
# By `device_kind`; some kinds have two names.
CHIPS = {
    "TPU v5 lite": _V5E,
    "TPU v5e": _V5E,
    "TPU v5": _V5P,
    "TPU v5p": _V5P,
    "TPU v6 lite": _V6E,
    "TPU v6e": _V6E,
    "TPU7x": _V7X,
}


def chip() -> Chip:
    """The chip that is compiled for: the abstract mesh's, or the default device's; v6e where that is no TPU."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return CHIPS.get(device.device_kind if device else jax.devices()[0].device_kind, _V6E)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """What a kernel chooses for each query.

    Attributes:
        k: candidates, the best by score; the lowest win ties.
        keep_first, keep_last: visible candidates that are chosen whatever they score, the first and the last.
        has_sort_keys: whether to return the sort keys of the chosen, too: what `merge` needs.
        interpret: see types.py.
    """

    k: int
    keep_first: int = 0
    keep_last: int = 0
    has_sort_keys: bool = False
    interpret: Interpret = False
