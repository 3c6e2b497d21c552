"""What the YAML files beside this one name; lm-eval imports it by its path."""

from typing import Any

import datasets

from hisa_jax.models.evaluate import needles

_TAKEN = ("checkpoint", "lengths", "n", "text", "style", "seed")


def single(**metadata: Any) -> dict[str, Any]:
    """One key, one value."""
    return _dataset("single", metadata)


def multikey(**metadata: Any) -> dict[str, Any]:
    """Many keys alike."""
    return _dataset("multikey", metadata)


def multivalue(**metadata: Any) -> dict[str, Any]:
    """Several values of a key."""
    return _dataset("multivalue", metadata)


def multiquery(**metadata: Any) -> dict[str, Any]:
    """Several questions about a text."""
    return _dataset("multiquery", metadata)


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """The share of the values that the answer names."""
    return {"found": needles.found_in(results[0], doc["outputs"])}


def _dataset(kind: str, metadata: dict[str, Any]) -> dict[str, Any]:
    """lm-eval hands in all metadata that it has, of which these are ours."""
    if "checkpoint" not in metadata:
        raise ValueError("needles: no checkpoint, wanted metadata with the folder whose tokens are counted")
    given = {name: metadata[name] for name in _TAKEN if metadata.get(name) is not None}
    return {"test": datasets.Dataset.from_list(needles.questions(kind, **given), split=datasets.Split.TEST)}
