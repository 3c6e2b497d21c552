"""The attention on one device, and the parts of it that a device of a mesh has."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array

from hisa_jax.lighthouse import dense, scores
from hisa_jax.lighthouse.method import Lighthouse, Pyramid
from hisa_jax.lighthouse.rope import Rotate, last_positions
from hisa_jax.lighthouse.selection import LighthouseSelection
from hisa_jax.lighthouse.windows import gather, spread


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What is no array: which implementation attends, the factor of its logits, how entries are rotated.

    Static under jit, so `rotate` is hashable, and equal to one that does the same.
    """

    name: str
    scale: float
    rotate: Rotate | None = None

    def rotated(self, rotate: Rotate | None) -> "Options":
        return dataclasses.replace(self, rotate=rotate)


def strengths(
    q: Array, k: Array, v: Array | None = None, *, method: Lighthouse, options: Options
) -> tuple[Array, Array]:
    """Scores of queries and of keys, [B, T, G] float32."""
    return scores.scores(q, k, v, method, lambda q, k, v: attention(q, k, v, options))


def attention(q: Array, k: Array, v: Array, options: Options) -> Array:
    """Dense causal attention of any number of rows."""
    S = q.shape[1]
    more = ((0, 0), (0, -S % dense.rows(options.name)), (0, 0), (0, 0))
    return dense.attention(options.name, options.scale)(*(jnp.pad(x, more) for x in (q, k, v)))[:, :S]


@functools.partial(jax.jit, static_argnames=("method", "options"))
def attend(
    q: Array, k: Array, v: Array, selection: LighthouseSelection, positions: Array, method: Lighthouse, options: Options
) -> Array:
    """[B, T, H, D], [B, T, G, D], [B, T, G, V], positions [B, T] -> [B, T, H, V]."""
    pyramid = method.pyramid(q.shape[1])
    entries, slots = selection.entries, selection.slots
    # Empty places at the end, up to what the kernel takes: no entry sees them.
    more = ((0, 0), (0, -entries.shape[1] % dense.rows(options.name)), (0, 0))
    entries = jnp.pad(entries, more, constant_values=-1)
    out = attention(*operands(q, k, v, entries, slots, positions, pyramid, options.rotate), options)
    return results(out, entries, slots, pyramid, None)


def operands(
    q: Array, k: Array, v: Array, entries: Array, slots: Array, positions: Array, pyramid: Pyramid,
    rotate: Rotate | None,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Queries, keys and values of the entries, rotated: [B, S, H, D], [B, S, G, D], [B, S, G, V]."""
    B, T, H, D = q.shape
    G = k.shape[2]
    # A group's queries lie side by side, so that they are one row.
    q, k, v = (gather(x, entries, slots, pyramid) for x in (q.reshape(B, T, G, H // G * D), k, v))
    q = q.reshape(B, -1, G, H // G, D)
    if rotate is not None:
        at = last_positions(entries, positions, pyramid)
        q, k = rotate(q, at), rotate(k[..., None, :], at)[..., 0, :]
    return q.reshape(B, -1, H, D), k, v


def results(out: Array, entries: Array, slots: Array, pyramid: Pyramid, axis: str | None) -> Array:
    """Outputs of entries [B, S, H, V] -> of tokens [B, T, H, V]."""
    B, S, H, V = out.shape
    G = entries.shape[2]
    tokens = spread(out.reshape(B, S, G, H // G * V), entries, slots, pyramid, axis)
    return tokens.reshape(B, pyramid.n_tokens, H, V)
