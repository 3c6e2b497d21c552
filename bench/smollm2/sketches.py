"""Index keys in fewer bytes, given back as float32: what the scan would read in place of the keys."""

import itertools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

GROUP = 32  # dims with a scale of their own
# Levels that code a normal variable of variance 1 with the least square error (Lloyd 1957, Max 1960).
_LEVELS = {2: (0.4528, 1.510), 3: (0.2451, 0.7560, 1.344, 2.152)}
_RANK = 64


class Sketch(NamedTuple):
    """`bytes`: a token's, of a head of 128, with scales of two bytes."""

    name: str
    bytes: int


SKETCHES = (
    Sketch("8 bits", 136), Sketch("4 bits", 72), Sketch("3 bits", 56), Sketch("2 bits", 40),
    Sketch("4 bits, rotated", 72), Sketch("3 bits, rotated", 56),
    Sketch("3 bits, Lloyd-Max", 56), Sketch("2 bits, Lloyd-Max", 40), Sketch("signs", 18),
    Sketch("64 directions, 8 bits", 68), Sketch("64 directions, 4 bits", 36), Sketch("means of 4", 64),
)  # fmt: skip
NAMES = tuple(sketch.name for sketch in SKETCHES)


def rotation(size: int) -> np.ndarray:
    """[D, D] float32, orthogonal: random signs, fixed, then a Hadamard transform; D a power of two."""
    signs = np.random.default_rng(0).integers(0, 2, size) * 2 - 1
    hadamard = np.ones((1, 1))
    while len(hadamard) < size:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    return (signs[:, None] * hadamard / np.sqrt(size)).astype(np.float32)


def make(names: tuple[str, ...], k: Array, directions: Array) -> dict[str, Array]:
    """Sketches of keys [S, D], by name.

    Args:
        directions: [D, D] float32, orthonormal columns, those that hold most of the keys first.
    """
    k = k.astype(jnp.float32)
    turn = jnp.asarray(rotation(k.shape[1]))
    made = {}
    for name in names:
        if name == "means of 4":
            made[name] = jnp.repeat(jnp.mean(k.reshape(-1, 4, k.shape[1]), axis=1), 4, axis=0)
        elif name.startswith("64 directions"):
            some = directions[:, :_RANK]
            made[name] = _times(_whole(_times(k, some), 8 if "8 bits" in name else 4), some.T)
        elif name == "signs":
            turned = _times(k, turn)
            size = jnp.mean(jnp.abs(turned), axis=-1, keepdims=True)
            made[name] = _times(jnp.where(turned > 0, size, -size), turn.T)
        elif name.endswith("Lloyd-Max"):
            made[name] = _times(_levels(_times(k, turn), _LEVELS[int(name[0])]), turn.T)
        elif name.endswith("rotated"):
            made[name] = _times(_whole(_times(k, turn), int(name[0])), turn.T)
        else:
            made[name] = _whole(k, int(name[0]))
    return made


def _times(x: Array, matrix: Array) -> Array:
    """[S, m], [m, n] -> [S, n] in full float32, which a GPU's product is not by itself."""
    return jnp.matmul(x, matrix, precision=lax.Precision.HIGHEST)


def _grouped(x: Array) -> Array:
    return x.reshape(*x.shape[:-1], -1, GROUP)


def _whole(x: Array, bits: int) -> Array:
    """The nearest of 2^bits - 1 whole multiples of a scale, the largest dim's of each group."""
    most = 2 ** (bits - 1) - 1
    groups = _grouped(x)
    scale = jnp.maximum(jnp.max(jnp.abs(groups), axis=-1, keepdims=True) / most, 1e-30)
    return (jnp.clip(jnp.round(groups / scale), -most, most) * scale).reshape(x.shape)


def _levels(x: Array, levels: tuple[float, ...]) -> Array:
    """The nearest of given levels times a scale, each group's root mean square."""
    groups = _grouped(x)
    scale = jnp.maximum(jnp.sqrt(jnp.mean(groups**2, axis=-1, keepdims=True)), 1e-30)
    size = jnp.abs(groups) / scale
    coded = jnp.full_like(size, levels[0])
    for low, high in itertools.pairwise(levels):
        coded = jnp.where(size > (low + high) / 2, high, coded)
    return (jnp.sign(groups) * coded * scale).reshape(x.shape)
