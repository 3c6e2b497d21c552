"""What one run of the lab holds and does: the model, its text, indexers; parts that each write their rows."""

import dataclasses
import json
import math
import time
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bench import UserError
from bench.records import plain, whole_file
from bench.smollm2 import adversary, answers, joint, measure, training
from bench.smollm2.filters import Method
from bench.smollm2.indexers import Indexers
from bench.smollm2.methods import FLAT, core, fitting, opposed, sketched, varied
from bench.smollm2.model import Config, Weights
from bench.smollm2.programs import Programs
from bench.smollm2.prompts import KINDS, Prompts

_LONG = ("by_layer", "over_dense_by_window", "over_flat_by_window", "device", "size", "jax")  # not printed


class Data(NamedTuple):
    """Tokens: `train` [N] and `windows` [n, T] uint16, and prompts."""

    train: np.ndarray
    windows: np.ndarray
    prompts: Prompts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """How much is measured.

    Attributes:
        T: tokens of a window and of a prompt.
        topk: tokens that each query attends to.
        topks: others at which selections are compared.
        windows, prompts: for bits and answers.
        compared: windows for the comparison of selections.
        variations: whether the scan's are compared, too.
        methods: how many have the model run with them.
    """

    T: int
    topk: int
    topks: tuple[int, ...]
    windows: int
    prompts: int
    compared: int
    variations: bool
    methods: int
    steps: int
    H: int


SIZES = {
    "small": Size(
        T=1024, topk=16, topks=(), windows=1, prompts=2, compared=1, variations=False, methods=5, steps=20, H=16
    ),
    "full": Size(
        T=8192,
        topk=128,
        topks=(64, 256, 512),
        windows=8,
        prompts=12,
        compared=1,
        variations=True,
        methods=12,
        steps=870,
        H=64,
    ),
}


class Rows:
    """Where rows go: a line of JSON each, appended as it is measured."""

    def __init__(self, file: Path):
        file.parent.mkdir(parents=True, exist_ok=True)
        self.file, self.start = file, time.monotonic()

    def add(self, row: dict[str, Any]) -> None:
        row = {**row, "t": time.monotonic() - self.start}
        line = json.dumps(plain(row, digits=5))
        with self.file.open("a") as file:
            file.write(line + "\n")
        print(" ".join(f"{name}={_short(value)}" for name, value in row.items() if name not in _LONG), flush=True)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@dataclasses.dataclass(eq=False)
class Lab:
    """A model with indexers, and what they are measured by.

    Attributes:
        about: fields of every row, among them what the indexers are.
        until: of `time.monotonic()`: nothing begins later.
    """

    config: Config
    weights: Weights
    data: Data
    size: Size
    rows: Rows
    until: float
    indexers: Indexers
    programs: Programs = dataclasses.field(default_factory=Programs)
    about: dict[str, Any] = dataclasses.field(default_factory=dict)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.add({**self.about, **row})

    def has_time(self) -> bool:
        return time.monotonic() < self.until

    def prepare(self, parts: Sequence[str], methods: dict[str, Method]) -> None:
        """Begins to compile what will run."""
        if "compare" in parts:
            self._comparing()
        if "answer" in parts:
            for method in (None, *methods.values()):
                self._answering(method)

    def _comparing(self) -> Future[Any]:
        methods = tuple(method for _, method in self.compared())
        program = measure.make_measure(self.config, methods, self.size.topk)
        return self.programs.start(("compare", methods), program, *self._model(), self._tokens(0))

    def _answering(self, method: Method | None) -> Future[answers.Forward]:
        prompts = self.data.prompts
        shapes = answers.answer_positions(prompts)[0].shape, prompts.choices[0].shape
        rest = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes]
        program = answers.make_forward(self.config, method)
        return self.programs.start(("answer", method), program, *self._model(), self._tokens(0), *rest)

    def _model(self) -> tuple[Weights, Indexers, jax.ShapeDtypeStruct]:
        """What every program begins with; of the directions the shape alone."""
        L, D = self.indexers.k.shape[0], self.indexers.k.shape[-1]
        return self.weights, self.indexers, jax.ShapeDtypeStruct((L, D, D), jnp.float32)

    def _tokens(self, window: int) -> jax.Array:
        return jnp.asarray(self.data.windows[window], jnp.int32)

    def compared(self) -> list[tuple[str, Method]]:
        """The methods whose selections are compared, by name, some at several numbers of chosen tokens."""
        size, H = self.size, self.indexers.H
        found = core(size.topk) | (sketched(size.topk) | varied(size.topk) if size.variations else {})
        named = list(fitting(found, H, size.T).items())
        # At other numbers of chosen tokens the library's methods and those of others, without variations.
        for topk in size.topks:
            named += fitting(core(topk), H, size.T).items()
        return named

    def train(self, recipe: training.Recipe, load: Path | None, save: Path | None, stops: Sequence[int]) -> None:
        """Trains new indexers, on from `load`; compares the methods at some steps on the way."""
        state = training.first_state(self.config, self.indexers.H, recipe)
        if load is not None:
            state = training.load(load, state)
        # Comparing reads the indexers and changes nothing, so training goes on as if there were no stop.
        for stop in (*sorted(stops), recipe.steps):
            state = training.train(
                state, self.weights, self.config, recipe, self.data.train, self.until, self.add, stop
            )  # fmt: skip
            self.indexers = state.indexers
            self.about["step"] = int(state.step)
            if stop in stops:
                self.compare()
        if save is not None:
            training.save(save, state)

    def train_jointly(self, recipe: joint.Recipe) -> None:
        """Trains model and indexers together, whatever they are now."""
        dtype = self.weights.embed.dtype
        state = joint.first_state(self.weights, self.indexers, recipe)
        state = joint.train(state, self.config, recipe, self.data.train, dtype, self.until, self.add)
        self.weights = jax.tree.map(lambda x: x.astype(dtype), state.weights)
        self.indexers = state.indexers
        self.about["joint_step"] = int(state.step)

    def compare(self) -> None:
        """Recall and mass of all methods at the flat model's hidden states, and how linear the heads are."""
        run, named, directions = self._comparing().result(), self.compared(), self._directions()
        each = [
            run(self.weights, self.indexers, directions, self._tokens(i))
            for i in _spread(len(self.data.windows), self.size.compared)
        ]
        measures, heads = jax.tree.map(lambda *x: np.mean(np.stack(x), axis=0), *each)
        for i, (name, method) in enumerate(named):
            of_layers = {field: x[:, i] for field, x in measures._asdict().items()}
            self.add({
                "kind": "compare", "method": name, "topk": method.topk,
                **{field: float(np.mean(x)) for field, x in of_layers.items()},
                "worst_layer": float(np.min(of_layers["recall"])), "by_layer": of_layers["recall"].tolist(),
            })  # fmt: skip
        for field, x in heads._asdict().items():
            self.add({"kind": "heads", "measure": field, "mean": float(np.mean(x)), "by_layer": x.tolist()})

    def _directions(self) -> jax.Array:
        tokens = jnp.asarray(self.data.train[: self.size.T], jnp.int32)
        return measure.directions(self.weights, self.config, self.indexers, tokens)

    def answer(self, methods: dict[str, Method]) -> None:
        """Bits a token and answers, dense attention first, then the methods in order while there is time."""
        chosen: dict[str, Method | None] = {"dense": None, **methods}
        directions, base = self._directions(), dict[str, np.ndarray]()
        for name, method in chosen.items():
            # A method begun late is finished: rows are whole or not there.
            if not self.has_time():
                break
            forward = self._answering(method).result()
            found = answers.measure(
                forward, self.weights, self.indexers, directions, self.data.windows, self.data.prompts
            )
            base[name] = found.nats
            row: dict[str, Any] = {"kind": "answer", "method": name, "topk": method.topk if method else None}
            row["bits"] = float(found.nats.mean()) / math.log(2)
            for other in ("dense", FLAT):
                if other in base:
                    row |= _excess(other, found.nats, base[other])
            self.add({**row, "answers": answers.by_kind(self.data.prompts, found, KINDS)})

    def oppose(self) -> None:
        """Recall where heads have nothing in common."""
        size, H = self.size, self.indexers.H
        found = fitting(opposed(size.topk), H, size.T)
        for row in adversary.recalls(found, size.T, H):
            self.add({"kind": "adversary", "topk": size.topk, **row})


def _spread(n: int, some: int) -> list[int]:
    """`some` of n numbers, evenly."""
    return [i * n // some for i in range(min(some, n))]


def _excess(other: str, nats: np.ndarray, base: np.ndarray) -> dict[str, Any]:
    """Bits more than another's: mean, standard error over tokens, by window."""
    # Paired by token: the text's own spread is no part of the error.
    more = (nats - base).astype(np.float64) / math.log(2)
    return {
        f"over_{other}": float(more.mean()),
        f"over_{other}_se": float(more.std() / math.sqrt(more.size)),
        f"over_{other}_by_window": [float(x) for x in more.mean(axis=1)],
    }


def load_data(file: Path, size: Size) -> Data:
    """Reads what `save_data` wrote.

    Raises: UserError: another kind of file, or windows of another size.
    """
    try:
        with np.load(file) as arrays:
            prompts = Prompts(arrays["prompts"], arrays["questions"], arrays["choices"])
            data = Data(arrays["train"], arrays["windows"], prompts)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from error
    if data.windows.shape[1] != size.T:
        raise UserError(f"{file}: holds windows of {data.windows.shape[1]} tokens, wanted {size.T}, those of --size")
    return data


def save_data(file: Path, data: Data) -> None:
    tokens, questions, choices = data.prompts
    arrays = {"train": data.train, "windows": data.windows, "prompts": tokens}
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(file) as partial:
        np.savez_compressed(partial, allow_pickle=False, **arrays, questions=questions, choices=choices)
