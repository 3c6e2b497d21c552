"""One scale a token, as DeepSeek quantises index queries and keys. All arithmetic in float32, so bits can be compared.

    amax = max(|x| over the last axis, 1e-4);  scale = amax * float32(1 / largest);  value = round(clip(x / scale))

`largest` is 448 for e4m3 and 127 for int8; both round half to even. "ue8m0" rounds the scale up to a power of two.
"""

import ml_dtypes
import numpy as np

LARGEST = {"float8_e4m3fn": 448, "int8": 127}


def quantize_keys(k, dtype="float8_e4m3fn", scale: str = "float32") -> tuple[np.ndarray, np.ndarray]:
    """[.., D] -> values [.., D] of `dtype`, scales [..] float32."""
    name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    if name not in LARGEST or scale not in ("float32", "ue8m0"):
        raise ValueError(
            f"oracle: dtype={name!r}, scale={scale!r}, wanted one of {list(LARGEST)}, 'float32' or 'ue8m0'"
        )
    k, largest = np.asarray(k).astype(np.float32), np.float32(LARGEST[name])
    with np.errstate(invalid="ignore", over="ignore"):
        amax = np.maximum(np.abs(k).max(axis=-1), np.float32(1e-4))  # NaN stays NaN: such a token scores -inf
        scales = amax * np.float32(1 / LARGEST[name])
        scales = power_of_two_above(scales) if scale == "ue8m0" else scales
        values = np.clip(k / scales[..., None], -largest, largest)
    if name == "int8":
        return np.rint(np.nan_to_num(values, nan=0.0)).astype(np.int8), scales
    return values.astype(ml_dtypes.float8_e4m3fn), scales


def quantize_queries(q, w, dtype="float8_e4m3fn", scale: str = "float32") -> tuple[np.ndarray, np.ndarray]:
    """[.., H, D], [.., H] -> values [.., H, D] of `dtype`, w * scale [.., H] float32."""
    values, scales = quantize_keys(q, dtype, scale)
    return values, np.asarray(w).astype(np.float32) * scales


def dequantize(values, scales) -> np.ndarray:
    """[.., D], [..] -> [.., D] float64, exact."""
    return np.asarray(values).astype(np.float64) * np.asarray(scales).astype(np.float64)[..., None]


def power_of_two_above(x: np.ndarray) -> np.ndarray:
    """2^ceil(log2(x)) of positive normal float32 numbers: the exponent goes up by one if the fraction is not 0."""
    bits = np.asarray(x).view(np.uint32)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0)
    return np.where(np.isfinite(x), np.asarray(exponent << 23, np.uint32).view(np.float32), x)
