"""What each method selects for one query of a text: to look at, and as a number.

The text is read with the flat indexer, and each method selects from the same queries and keys, as in `models check`.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import hisa_jax as hj
from hisa_jax.methods import flat_of
from hisa_jax.models.check.measures import attention_mass, methods_to_check
from hisa_jax.models.check.reading import Seen, read, sampled_positions
from hisa_jax.models.modeling import Model
from hisa_jax.models.text import Text
from hisa_jax.models.tokens import Tokenizer

_SHOWN = {"flat": "flat", "HISA": "HISA", "scan": "scan, 2 k", "block-sparse": "block-sparse"}
_CHUNK, _LEAST = 256, 256


def methods_to_look_at(topk: int) -> dict[str, hj.Method]:
    """Flat, HISA, the scan and block-sparse of `topk` tokens each; block-sparse where topk is made of blocks."""
    found = methods_to_check(topk)
    return {name: found[key] for name, key in _SHOWN.items() if key in found}


def look(
    model: Model, tokens: Sequence[int], layer: int, query: int, methods: dict[str, hj.Method]
) -> list[dict[str, Any]]:
    """What one query of a text selects.

    Args:
        model: with any method.
        tokens: of the text.
        layer: one that selects.
        query: a position in the text.
        methods: by name, "flat" among them.

    Returns: a method each: name, definition, positions in ascending order, recall of the flat selection, and the share
        of the attention that falls on them.
    """
    (seen,) = [seen for seen in _read(model, tokens, np.array([query], np.int32)) if seen.layer == layer]
    rows = {name: _select(seen, method).indices[0] for name, method in methods.items()}
    masses = attention_mass(
        seen.heads, seen.latents, jnp.asarray(seen.positions), tuple(rows.values()), model.config.softmax_scale
    )
    flat = set(np.asarray(rows["flat"][0]).tolist()) - {-1}
    found = []
    for (name, method), indices, mass in zip(methods.items(), rows.values(), masses, strict=True):
        chosen = [position for position in np.asarray(indices[0]).tolist() if position >= 0]
        found.append(
            {
                "name": name, "definition": repr(method), "positions": chosen,
                "recall": len(flat & set(chosen)) / len(flat), "mass": float(mass[0]),
            }
        )  # fmt: skip
    return found


def recall(model: Model, tokens: Sequence[int], n: int = 32) -> dict[int, float]:
    """Mean recall of the model's own decoding method against the flat indexer's selections, by layer.

    Of queries that see more than topk tokens: others select all. Layers without such a query are left out.

    Args:
        model: whose plan says what each layer selects by.
        tokens: of a text.
        n: queries, evenly spaced over its last half.
    """
    positions, found = sampled_positions(len(tokens), n), {}
    for seen in _read(model, tokens, positions):
        method = model.plan(seen.layer, "decode")
        chooses = positions >= method.topk
        if chooses.any():
            selection, flat = _select(seen, method), _select(seen, flat_of(method))
            found[seen.layer] = float(np.mean(np.asarray(hj.compare(selection, flat).recall)[0, chooses]))
    return found


def texts_of(tokens: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """The text that each token completes; joined, that of all."""
    text, parts = Text(tokenizer=tokenizer), []
    for token in tokens:
        text = text.read(token)
        parts.append(text.new)
    return [*parts[:-1], parts[-1] + text.end()] if parts else []


def _read(model: Model, tokens: Sequence[int], positions: np.ndarray) -> list[Seen]:
    # Of a few sizes, so that programs compile once for many texts; no query sees what comes after it.
    size = min(max(_LEAST, 1 << (len(tokens) - 1).bit_length()), max(model.config.max_position_embeddings, len(tokens)))
    padded = [*tokens, *[0] * (size - len(tokens))]
    return list(read(_flat(model), padded, positions, _CHUNK, lambda n: None))


@functools.lru_cache(maxsize=1)
def _flat(model: Model) -> Model:
    return model.with_method(hj.Dsa(topk=model.config.index_topk))


def _select(seen: Seen, method: hj.Method) -> hj.Selection:
    return _selected(seen.q, seen.k, seen.w, jnp.asarray(seen.positions)[None], method)


@functools.partial(jax.jit, static_argnames="method")
def _selected(q: Array, k: Array | hj.QuantizedKeys, w: Array, positions: Array, method: hj.Method) -> hj.Selection:
    return hj.select(q, k, w, method, query_positions=positions)
