"""What the launches of several kernels share."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt


def whole(arrays: Any) -> Any:
    """Blocks of a tree of arrays: every program gets all of each, and finds its rows when it runs."""
    return jax.tree.map(lambda x: pl.BlockSpec(x.shape, lambda *_: (0,) * x.ndim), arrays)


def by_tiles(
    body: Callable[..., None], inputs: Any, grid: tuple[int, int], shape: tuple[int, int], *, num_warps: int,
    num_stages: int, name: str, interpret: bool,
) -> Array:  # fmt: skip
    """Runs `body(inputs, out)` once for each tile of queries and span of keys -> out, of this shape, int32.

    Programs that follow one another have other queries and the same keys, which L2 then has. They get whole arrays:
    which rows are theirs, `tiles` and the page table say.
    """
    return pl.pallas_call(
        body,
        grid=grid,
        in_specs=[whole(inputs)],
        out_specs=pl.BlockSpec(shape, lambda t, s: (0, 0)),
        out_shape=jax.ShapeDtypeStruct(shape, jnp.int32),
        compiler_params=plt.CompilerParams(num_warps=num_warps, num_stages=num_stages),
        name=name,
        interpret=interpret,
    )(inputs)
