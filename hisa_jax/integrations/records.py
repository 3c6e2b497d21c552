"""The layouts in which other programs keep index keys in pages, read into keys and scales.

head_along_sublane  uint8 [pages, page / 4, 4, W]: a record a token, D bytes of e4m3, then at D rounded up to 128 its
                    ue8m0 scale, W a multiple of 128; or bfloat16 [pages, page / 2, 2, W], D numbers a token
seq_along_lane      uint8 [pages, rows / 4, 4, page]: the same record down the rows, a token a lane

The first is that of tpu-inference, sglang-jax and tokamax, the second tokamax's.
"""

from typing import Any, Literal, get_args

import jax.numpy as jnp
from jax import Array, lax

from hisa_jax import checks

Layout = Literal["head_along_sublane", "seq_along_lane"]
_LANES = 128


def check_layout(call: str, kv_layout: Any) -> Layout:
    """The name of a layout, of tokamax's KVLayout for instance. Raises ValueError: there is none of that name."""
    name = str(kv_layout).lower()
    if name not in get_args(Layout):
        raise ValueError(f"{call}: kv_layout={kv_layout!r}, wanted one of {', '.join(get_args(Layout))}")
    return name  # type: ignore[return-value]


def page_size(call: str, cache_kv: Array, D: int, layout: Layout) -> int:
    """Tokens of a page. Raises TypeError, ValueError: what holds no keys of D numbers in this layout."""
    is_lanes = layout == "seq_along_lane"
    checks.dtype(call, "cache_kv", cache_kv, ("uint8",) if is_lanes else ("uint8", "bfloat16"))
    packing = 4 // cache_kv.dtype.itemsize
    wanted = ("pages", "rows / 4", 4, "page") if is_lanes else ("pages", f"page / {packing}", packing, "width")
    checks.shape(call, "cache_kv", cache_kv, wanted, f"{layout} in {cache_kv.dtype.name}")
    _, groups, _, last = cache_kv.shape
    width = groups * packing if is_lanes else last
    least = D if cache_kv.dtype == jnp.bfloat16 else _place_of_scale(D) + 1
    if width < least:
        raise ValueError(
            f"{call}: cache_kv is {checks.axes_of(cache_kv)}, wanted at least {least} numbers a token for keys of "
            f"D = {D}, in {layout}"
        )
    return last if is_lanes else groups * packing


def read(cache_kv: Array, D: int, layout: Layout) -> tuple[Array, Array | None]:
    """A checked cache -> keys [pages, page, D], bfloat16 or float8_e4m3fn, and of these the scales [pages, page]."""
    pages, groups, packing, last = cache_kv.shape
    if layout == "seq_along_lane":
        records = cache_kv.reshape(pages, groups * packing, last).swapaxes(1, 2)
    else:
        records = cache_kv.reshape(pages, groups * packing, last)
    if cache_kv.dtype == jnp.bfloat16:
        return records[..., :D], None
    values = lax.bitcast_convert_type(records[..., :D], jnp.float8_e4m3fn)
    return values, _scale_of(records[..., _place_of_scale(D)])


def _place_of_scale(D: int) -> int:
    return -(-D // _LANES) * _LANES


def _scale_of(exponent: Array) -> Array:
    """ue8m0 bytes -> float32 powers of two, NaN for 255; by bits, the same on every device."""
    exponent = exponent.astype(jnp.int32)
    # The least, 2^-127, is below the normal numbers.
    bits = jnp.where(exponent == 0, 1 << 22, exponent << 23)
    return jnp.where(exponent == 255, jnp.nan, lax.bitcast_convert_type(bits, jnp.float32))
