"""Muon for matrices, AdamW for the rest; and which weights a stage trains."""

import optax
from optax.contrib import MuonDimensionNumbers, muon

from hisa_jax.models.training.recipe import Recipe, Stage
from hisa_jax.models.training.weights import Weights

# Axes that a product sums over, then those it makes, of the weights that are matrices or fold into one. Axis 0 is that
# of layers, each a matrix of its own.
_MATRICES = {
    "attention.q_a": MuonDimensionNumbers(1, 2),
    "attention.q_b": MuonDimensionNumbers(1, (2, 3)),
    "attention.kv_a": MuonDimensionNumbers(1, 2),
    "attention.k_b": MuonDimensionNumbers(1, (2, 3)),
    "attention.v_b": MuonDimensionNumbers(1, (2, 3)),
    "attention.o": MuonDimensionNumbers((1, 2), 3),
    "indexer.q": MuonDimensionNumbers(1, (2, 3)),
    "indexer.k": MuonDimensionNumbers(1, 2),
    "mlp.gate": MuonDimensionNumbers(1, 2),
    "mlp.up": MuonDimensionNumbers(1, 2),
    "mlp.down": MuonDimensionNumbers(1, 2),
}
_LARGEST_GRADIENT = 1.0


def trained(stage: Stage, weights: Weights) -> tuple[Weights, Weights]:
    """Divides weights into those that a stage trains and those that it leaves as they are."""
    wanted = {
        "model": lambda name: ".indexer." not in name,
        "indexer": lambda name: ".indexer." in name,
        "all": lambda name: True,
    }[stage.trained]
    return (
        {name: x for name, x in weights.items() if wanted(name)},
        {name: x for name, x in weights.items() if not wanted(name)},
    )


def rate(stage: Stage) -> optax.Schedule:
    """A stage's learning rate by its step."""
    rise = min(stage.rise, stage.steps)
    return optax.warmup_cosine_decay_schedule(
        0.0, stage.learning_rate, rise, max(stage.steps, rise + 1), stage.end_rate
    )


def make_optimizer(recipe: Recipe, stage: Stage) -> optax.GradientTransformation:
    """The optimiser of a stage's trained weights.

    Source: Muon with updates of AdamW's size, so that both take one learning rate: arXiv 2502.16982.
    """
    return optax.chain(
        optax.clip_by_global_norm(_LARGEST_GRADIENT),
        muon(
            rate(stage), weight_decay=recipe.weight_decay, adam_b2=0.95, consistent_rms=0.2,
            muon_weight_dimension_numbers=lambda weights: {name: _matrix(name) for name in weights},
        ),
    )  # fmt: skip


def _matrix(name: str) -> MuonDimensionNumbers | None:
    return _MATRICES.get(".".join(name.split(".")[-2:]))
