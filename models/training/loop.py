"""Runs a recipe: resumable at any step, logged as it goes.

On a CPU the result is the same to the bit whether it was interrupted or not. On a GPU it would differ from run to run:
gradients of selected tokens are added in no fixed order.
"""

import csv
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from hisa_jax.models.export import save_indexers, save_pretrained
from hisa_jax.models.training.batches import Batch, Batches, prefetched
from hisa_jax.models.training.optimizer import make_optimizer, rate, trained
from hisa_jax.models.training.recipe import Recipe, Stage
from hisa_jax.models.training.step import AXIS, make_step, placement
from hisa_jax.models.training.text import Corpus
from hisa_jax.models.training.weights import Skeleton, Weights

RECIPE, CURVES, STATES, MODEL, INDEXERS = "recipe.json", "curves.csv", "states", "model", "indexers.safetensors"
COLUMNS = (
    "step", "stage", "context", "bytes", "loss", "text_bits", "answer_bits", "answers_right", "kl", "rate",
    "gradient_norm", "seconds",
)  # fmt: skip
_LOGGED = 10  # steps between readings of the metrics: reading waits for the device


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What does not change the result.

    Attributes:
        folder: of the run: recipe, curves, states, the model as it is and, numbered, as each stage left it; also the
            indexers alone, if nothing else is trained.
        save_every: steps between saved states.
        stop_after, stop_at: seconds and steps after which the run saves and ends, to be resumed; None for the end.
        workers: threads that prepare data.
    """

    folder: Path
    save_every: int = 200
    stop_after: float | None = None
    stop_at: int | None = None
    workers: int = 4


Row = dict[str, Any]


def train(
    recipe: Recipe, corpus: Corpus, settings: Settings, *, start: Weights | None = None,
    show: Callable[[Row], None] = lambda row: None,
) -> int:  # fmt: skip
    """Trains from the folder's last saved state, or from the start.

    Args:
        recipe: what to train.
        corpus: text.
        settings: folder and pace.
        start: weights to begin with, where there is no saved state. Default: random ones.
        show: is told each logged row of the curves.

    Returns: steps done in all; fewer than the recipe's if it was stopped.
    Raises: ValueError: the folder holds a run of another recipe; a step's rows that devices cannot share.
    """
    settings.folder.mkdir(parents=True, exist_ok=True)
    _check_recipe(recipe, settings.folder / RECIPE)
    mesh = Mesh(np.array(jax.devices()), (AXIS,))
    for stage in recipe.stages:
        if stage.rows // stage.accumulate % mesh.size:
            raise ValueError(
                f"train: stage {stage.name!r} has {stage.rows // stage.accumulate} rows a pass, wanted a multiple of "
                f"the {mesh.size} devices"
            )
    started = time.perf_counter()
    skeleton = Skeleton(recipe.config)
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    with ocp.CheckpointManager((settings.folder / STATES).absolute(), options=options) as states:
        # A run is its last saved state: batches are a function of the step, so nothing else needs to be restored.
        done = states.latest_step() or 0
        weights, state = _restore(recipe, skeleton, states, start, mesh)
        with _Curves(settings.folder / CURVES, done) as curves:
            while done < recipe.n_steps and not _is_over(settings, started, done):
                i, first = recipe.stage_at(done)
                stage = recipe.stages[i]
                batches = Batches(
                    corpus, length=stage.context, batch=stage.rows, synthetic_share=stage.synthetic_share,
                    seed=recipe.seed + 1000 * i,
                )  # fmt: skip
                kinds = dict.fromkeys((stage.attention, stage.attention_at(stage.steps - 1)))
                steps = {kind: make_step(recipe, stage, kind, skeleton, mesh) for kind in kinds}
                for batch in prefetched(batches, first, stage.steps - first, settings.workers):
                    k = recipe.stage_at(done)[1]
                    step = steps[stage.attention_at(k)]
                    weights, state, metrics = step(weights, state, *_placed(batch, stage, mesh))
                    done += 1
                    curves.add(_Pending(done, stage, k, metrics))
                    if done % _LOGGED == 0:
                        for row in curves.write():
                            show(row)
                    if _is_over(settings, started, done):
                        break
                    # Not at a stage's end, after which a resumed run wants the next stage's fresh optimiser.
                    if done % settings.save_every == 0 and k + 1 < stage.steps:
                        _save(states, done, weights, state)
                if done < recipe.n_steps and recipe.stage_at(done)[1] == 0:
                    state = _fresh(recipe, recipe.stages[i + 1], weights)
                    save_pretrained(skeleton.model(weights), settings.folder / f"{MODEL}_{i}", overwrite=True)
            for row in curves.write():
                show(row)
        if done != states.latest_step():
            _save(states, done, weights, state)
    model = skeleton.model(weights)
    save_pretrained(model, settings.folder / MODEL, overwrite=True)
    if all(stage.trained == "indexer" for stage in recipe.stages):
        save_indexers(model, settings.folder / INDEXERS)
    return done


def _is_over(settings: Settings, started: float, done: int) -> bool:
    too_late = settings.stop_after is not None and time.perf_counter() - started > settings.stop_after
    return too_late or (settings.stop_at is not None and done >= settings.stop_at)


def _fresh(recipe: Recipe, stage: Stage, weights: Weights) -> Any:
    learnt, _ = trained(stage, weights)
    return jax.jit(make_optimizer(recipe, stage).init)(learnt)


def _restore(
    recipe: Recipe, skeleton: Skeleton, states: ocp.CheckpointManager, start: Weights | None, mesh: Mesh
) -> tuple[Weights, Any]:
    """Weights and the optimiser's state, on all devices."""
    everywhere = NamedSharding(mesh, P())
    done = states.latest_step()
    stage = recipe.stages[recipe.stage_at(min(done or 0, recipe.n_steps - 1))[0]]

    def first() -> tuple[Weights, Any]:
        weights = skeleton.initial(recipe.seed) if start is None else start
        return weights, _fresh(recipe, stage, weights)

    if done is None:
        return jax.device_put(first(), everywhere)
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), jax.eval_shape(first))
    restored = states.restore(done, args=ocp.args.StandardRestore({"weights": wanted[0], "optimizer": wanted[1]}))
    return restored["weights"], restored["optimizer"]


def _save(states: ocp.CheckpointManager, done: int, weights: Weights, state: Any) -> None:
    states.save(done, args=ocp.args.StandardSave({"weights": weights, "optimizer": state}))


def _placed(batch: Batch, stage: Stage, mesh: Mesh) -> tuple[jax.Array, jax.Array]:
    """[A, rows a pass, context + 1] on the devices."""
    tokens, is_answer = (x.reshape(stage.accumulate, -1, stage.context + 1) for x in (batch.tokens, batch.is_answer))
    return jax.device_put(tokens, placement(mesh)), jax.device_put(is_answer, placement(mesh))


def _check_recipe(recipe: Recipe, path: Path) -> None:
    if not path.exists():
        path.write_text(recipe.to_json())
    elif path.read_text() != recipe.to_json():
        raise ValueError(f"train: {path} is of another recipe: give another folder, or the recipe that it began with")


@dataclasses.dataclass(frozen=True)
class _Pending:
    """A step whose metrics may not be there yet; `k` is its number in the stage."""

    step: int
    stage: Stage
    k: int
    metrics: Any


class _Curves:
    """curves.csv. Rows of steps after the restored one are removed: these steps will be done again."""

    def __init__(self, path: Path, done: int):
        rows = []
        if path.exists():
            with path.open(newline="") as file:
                rows = [row for row in csv.DictReader(file) if int(row["step"]) <= done]
        self.file = path.open("w", newline="")
        self.writer = csv.DictWriter(self.file, COLUMNS)
        self.writer.writeheader()
        self.writer.writerows(rows)
        self.bytes = int(rows[-1]["bytes"]) if rows else 0
        self.seconds = float(rows[-1]["seconds"]) if rows else 0.0
        self.pending: list[_Pending] = []
        self.last = time.perf_counter()

    def __enter__(self) -> "_Curves":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def add(self, pending: _Pending) -> None:
        self.pending.append(pending)

    def write(self) -> list[Row]:
        """Waits for the steps that were added and writes them; returns the rows."""
        # Once for many steps, so that the device seldom waits for the host.
        values = jax.device_get([pending.metrics for pending in self.pending])
        now = time.perf_counter()
        self.seconds, self.last = self.seconds + now - self.last, now
        rows = []
        for pending, metrics in zip(self.pending, values, strict=True):
            self.bytes += pending.stage.rows * pending.stage.context
            rows.append({
                "step": pending.step, "stage": pending.stage.name, "context": pending.stage.context,
                "bytes": self.bytes, "loss": f"{metrics.loss:.5f}",
                "text_bits": f"{metrics.text_loss / np.log(2):.5f}",
                "answer_bits": f"{metrics.answer_loss / np.log(2):.5f}",
                "answers_right": f"{metrics.answers_right:.5f}", "kl": f"{metrics.kl:.5f}",
                "rate": f"{float(rate(pending.stage)(jnp.int32(pending.k))):.3e}",
                "gradient_norm": f"{metrics.gradient_norm:.4f}", "seconds": f"{self.seconds:.1f}",
            })  # fmt: skip
        self.writer.writerows(rows)
        self.file.flush()
        self.pending.clear()
        return rows
