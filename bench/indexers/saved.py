"""Rules on what the indexers of a model's layers were given: the queries and keys of a text, saved by whoever runs it.

A file, or several of other layers:

    layers      [L] int, numbers of the layers that it holds
    positions   [t] int, of the queries
    q, w, k     [L, t, H, D], [L, t, H], [L, S, D]; bfloat16 may come as uint16, as NumPy knows none
    mass        [L, t, S], shares of the attention of all heads: optional

What a layer takes over or looks up comes from the layer that its rule says, so that layers whose source is in no file
are left out. The text stays what it was: nothing is read by the rules' choices, so there are no bits and no answers.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import Array

import hisa_jax as hj
from bench import UserError
from bench.indexers.measure import chooser, selection_of
from bench.indexers.rules import Asked, Published, Rule

Row = dict[str, Any]


class Layer(NamedTuple):
    """What a layer asks for: its queries, its keys [1, S, D], and the attention's shares [t, S] or None."""

    here: Asked
    k: Array
    mass: np.ndarray | None


def read(files: Sequence[Path]) -> dict[int, Layer]:
    """The layers of all files, by their numbers. Raises: UserError: a file that is none, or says a layer again."""
    found: dict[int, Layer] = {}
    for file in files:
        try:
            with np.load(file) as arrays:
                made = _layers(arrays)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"--saved {file}: {error}") from error
        if again := found.keys() & made.keys():
            raise UserError(f"--saved {file}: layers {sorted(again)} came before")
        found |= made
    return dict(sorted(found.items()))


def _layers(arrays: Mapping[str, np.ndarray]) -> dict[int, Layer]:
    q, w, k = (_as_float(arrays[name]) for name in ("q", "w", "k"))
    mass, positions = arrays.get("mass"), jnp.asarray(arrays["positions"], jnp.int32)[None]
    return {
        int(layer): Layer(Asked(q[i : i + 1], w[i : i + 1], positions), k[i : i + 1], None if mass is None else mass[i])
        for i, layer in enumerate(arrays["layers"])
    }


def _as_float(x: np.ndarray) -> Array:
    return jnp.asarray(x.view(ml_dtypes.bfloat16) if x.dtype == np.uint16 else x, jnp.float32)


def rows(layers: Mapping[int, Layer], rules: Sequence[Rule]) -> Iterator[Row]:
    """Of each rule what it has of the first one's choice: means over layers, the worst layer, and of the mass of that.

    Left out are rules of neighbouring queries where the queries are no neighbours, and those of which every layer's
    source is missing.
    """
    wanted = {at: _chosen(layers, rules[0], at) for at in layers}
    positions = np.asarray(next(iter(layers.values())).here.positions)[0]
    for rule in rules:
        if rule.group > 1 and not _come_in_groups(positions, rule.group):
            continue
        recall, mass = list[float](), list[tuple[float, float]]()
        for at, layer in layers.items():
            if _source(rule, at) in layers:
                chosen = _chosen(layers, rule, at)
                recall.append(float(np.mean(np.asarray(hj.compare(chosen, wanted[at]).recall))))
                if layer.mass is not None:
                    mass.append((_kept(layer.mass, chosen), _kept(layer.mass, wanted[at])))
        if not recall:
            continue
        row: Row = {"method": rule.name, "layers": len(recall), "recall": float(np.mean(recall)), "worst": min(recall)}
        if mass:
            row["mass"], of_first = (float(np.mean(x)) for x in zip(*mass, strict=True))
            row["mass_of_first"] = row["mass"] / of_first
        yield row


def _kept(mass: np.ndarray, chosen: hj.Selection) -> float:
    """Mean over queries of the attention's share that goes to what was chosen."""
    ids = np.asarray(chosen.indices)[0]
    kept = np.take_along_axis(mass.astype(np.float32), np.maximum(ids, 0), axis=1)
    return float(np.mean(np.sum(np.where(ids < 0, 0, kept), axis=1)))


def _source(rule: Rule, at: int) -> int:
    """The layer that hands on what a layer takes over or looks up; else itself."""
    return at - at % (rule.lists if rule.role(at) == "look up" else rule.layers)


def _chosen(layers: Mapping[int, Layer], rule: Rule, at: int) -> hj.Selection:
    source = _source(rule, at)
    before: Published | None = None
    if source != at:
        before = chooser(rule.unnamed(), rule.role(source))(*layers[source][:2], None)
        if rule.role(at) == "take over":
            return selection_of(before.indices)
    return selection_of(chooser(rule.unnamed(), rule.role(at))(*layers[at][:2], before).indices)


def _come_in_groups(positions: np.ndarray, group: int) -> bool:
    firsts = positions[::group]
    if positions.size % group or (firsts % group).any():
        return False
    return bool((positions.reshape(-1, group) == firsts[:, None] + np.arange(group)).all())
