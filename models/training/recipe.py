"""What is trained and how: the model's sizes and the stages of DeepSeek Sparse Attention's recipe, as frozen values."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Literal, get_args

import hisa_jax as hj
from hisa_jax.models.config import Config, IndexerKind, LayerKind

Attention = Literal["dense", "sparse", "lighthouse"]
Trained = Literal["model", "indexer", "all"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """Steps of one kind: what is trained, on how long sequences, at which rate.

    Attributes:
        name: for curves and logs.
        attention: to all tokens ("dense"), to the selected ones ("sparse"), or over the entries of a pyramid
            ("lighthouse"), in training alone.
        trained: the weights of the indexers, of all else ("model"), or both. Indexers learn towards the heads'
            attention over the tokens that are attended to, the model to predict the next byte.
        context: tokens of a sequence.
        rows: sequences of a step, on all devices together.
        accumulate: passes that a step's sequences are divided into.
        steps: how many.
        learning_rate: the highest, reached after `rise` steps and lowered to `end_rate` by half a cosine.
        synthetic_share: of sequences that are long-range tasks in text, the others being text alone.
        method: what selects where attention is sparse; None for the config's own flat indexer. `hj.Hisa` or
            `hj.Scan` trains the indexer under the filter that it will run with. For "lighthouse" a `hj.Lighthouse`.
        dense_ends: of "lighthouse", how many layers at each end attend to all tokens.
        dense_after: of "lighthouse", after how many steps all layers do, all else going on as it was; None: never.
    """

    name: str
    attention: Attention
    trained: Trained
    context: int
    rows: int
    accumulate: int = 1
    steps: int
    learning_rate: float
    end_rate: float
    rise: int = 20
    synthetic_share: float
    method: hj.Method | hj.Lighthouse | None = None
    dense_ends: int = 0
    dense_after: int | None = None

    def __post_init__(self) -> None:
        for name, values in (("attention", get_args(Attention)), ("trained", get_args(Trained))):
            if getattr(self, name) not in values:
                raise ValueError(f"Stage: {name} is {getattr(self, name)!r}, wanted one of {', '.join(values)}")
        for name in ("context", "rows", "accumulate", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"Stage: {name} is {getattr(self, name)}, wanted 1 or more")
        if self.rows % self.accumulate:
            raise ValueError(f"Stage: rows is {self.rows}, wanted a multiple of accumulate = {self.accumulate}")
        if not 0 <= self.synthetic_share <= 1:
            raise ValueError(f"Stage: synthetic_share is {self.synthetic_share}, wanted 0 to 1")
        if isinstance(self.method, hj.Lighthouse) != (self.attention == "lighthouse"):
            raise ValueError(f"Stage: method is {self.method}, wanted a Lighthouse for 'lighthouse' and for it alone")
        if isinstance(self.method, hj.Lighthouse):
            if self.trained != "model":
                raise ValueError(f"Stage: trained is {self.trained!r}, wanted 'model': no indexer takes part")
            self.method.n_entries(self.context)  # raises where it does not divide the context
        elif self.dense_ends or self.dense_after is not None:
            raise ValueError(f"Stage: dense_ends and dense_after with {self.attention!r}, wanted 'lighthouse'")
        if self.dense_ends < 0 or (self.dense_after is not None and not 0 < self.dense_after < self.steps):
            raise ValueError(
                f"Stage: dense_ends is {self.dense_ends} and dense_after {self.dense_after}, wanted 0 or more, and a "
                f"step between the first and the last of {self.steps}"
            )

    def attention_at(self, k: int) -> Attention:
        """That of its step number k."""
        return "dense" if self.dense_after is not None and k >= self.dense_after else self.attention


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole training.

    Attributes:
        config: of the model; vocabulary of 256 bytes, an indexer in each layer.
        stages: in order. Each begins with a fresh optimiser.
        answer_weight: weight in the loss of a byte that answers a question of a task; all others weigh 1.
        weight_decay: of matrices.
        seed: of weights and data.
    """

    config: Config
    stages: tuple[Stage, ...]
    answer_weight: float = 8.0
    weight_decay: float = 0.1
    seed: int = 0

    @property
    def n_steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def stage_at(self, step: int) -> tuple[int, int]:
        """Which stage step number `step` belongs to, and its number in that stage."""
        for i, stage in enumerate(self.stages):
            if step < stage.steps:
                return i, step
            step -= stage.steps
        raise ValueError(f"Recipe: step {step} is beyond the last")

    def to_json(self) -> str:
        """All of it, methods by their class's name, for the run's folder."""
        return json.dumps(_plain(self), indent=1) + "\n"


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        if isinstance(value, Stage) and value.attention != "lighthouse":
            return {name: x for name, x in fields.items() if name not in ("dense_ends", "dense_after")}
        if isinstance(value, hj.Lighthouse):
            return {"method": "Lighthouse"} | fields
        if not isinstance(value, hj.Method):
            return fields
        # Functions that a method may have but does not are left out: earlier recipes know nothing of them.
        absent = () if isinstance(value, hj.Scan) else set(value.functions) - set(value.given())
        return {"method": type(value).__name__} | {name: x for name, x in fields.items() if name not in absent}
    if isinstance(value, tuple | list):
        return [_plain(x) for x in value]
    if isinstance(value, Mapping):
        return {name: _plain(x) for name, x in value.items()}
    if callable(value):
        return f"{value.__module__}.{value.__qualname__}"
    return value


def byte_config(context: int = 16384) -> Config:
    """19.0 M parameters: 8 layers of width 384 on bytes, 256 tokens selected.

    At 16K, 256 selected tokens are what 2048 are at 128K, one in 64; so are 1024 in kept blocks, one in 16.
    """
    layer_kinds: tuple[LayerKind, ...] = ("dense",) * 8
    indexer_kinds: tuple[IndexerKind, ...] = ("full",) * 8
    return Config(
        model_type="deepseek_v32",
        vocab_size=256,
        hidden_size=384,
        intermediate_size=1280,
        moe_intermediate_size=384,
        num_hidden_layers=len(layer_kinds),
        num_attention_heads=8,
        q_lora_rank=256,
        kv_lora_rank=128,
        qk_nope_head_dim=32,
        qk_rope_head_dim=32,
        v_head_dim=64,
        index_n_heads=16,
        index_head_dim=64,
        index_topk=256,
        n_routed_experts=1,
        n_shared_experts=1,
        num_experts_per_tok=1,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=1.0,
        rms_norm_eps=1e-6,
        rope_theta=1e5,
        max_position_embeddings=context,
        layer_kinds=layer_kinds,
        indexer_kinds=indexer_kinds,
    )


HISA = hj.Hisa(topk=256, block_size=32, block_topk=32)
"""The hierarchy at the model's size: 4 times the selected tokens in kept blocks, as published."""


def byte_recipe(seed: int = 0) -> Recipe:
    """Trains `byte_config`: dense attention at 2K and 16K, the indexers' warm-up, sparse attention at 16K.

    Source: the stages are DeepSeek-V3.2's, section 2.1.1.
    """
    return Recipe(
        config=byte_config(),
        stages=(
            # The model learns to read and to answer, short texts first: they are cheap.
            Stage(
                name="dense 2K", attention="dense", trained="model", context=2048, rows=128, steps=800,
                learning_rate=3e-3, end_rate=1.5e-3, synthetic_share=0.35,
            ),
            Stage(
                name="dense 16K", attention="dense", trained="model", context=16384, rows=16, steps=900,
                learning_rate=1.5e-3, end_rate=3e-4, synthetic_share=0.35,
            ),
            # The indexers learn the heads' attention, before anything depends on what they select.
            Stage(
                name="warm-up 4K", attention="dense", trained="indexer", context=4096, rows=8, steps=80,
                learning_rate=3e-3, end_rate=1e-3, synthetic_share=0.5,
            ),
            Stage(
                name="warm-up 16K", attention="dense", trained="indexer", context=16384, rows=4, steps=40,
                learning_rate=1e-3, end_rate=3e-4, synthetic_share=0.5,
            ),
            # All together, with the attention that the model will run with.
            Stage(
                name="sparse 16K", attention="sparse", trained="all", context=16384, rows=8, steps=250,
                learning_rate=5e-4, end_rate=2e-5, synthetic_share=0.35,
            ),
        ),
        seed=seed,
    )  # fmt: skip


def hisa_aware_recipe(seed: int = 0) -> Recipe:
    """Trains the indexers of a model that `byte_recipe` trained under the block filter, all else as it is."""
    stage = Stage(
        name="HISA-aware 16K", attention="sparse", trained="indexer", context=16384, rows=8, steps=120,
        learning_rate=5e-4, end_rate=2e-5, synthetic_share=0.35, method=HISA,
    )  # fmt: skip
    return Recipe(config=byte_config(), stages=(stage,), seed=seed)


LIGHTHOUSE = hj.Lighthouse(levels=3, pool=4, topk=256, tile=128)
"""At the model's size: 3087 entries for 16K tokens, in two tiles; topk is one in 64, as in the paper's runs."""


def lighthouse_recipe(seed: int = 0) -> Recipe:
    """`byte_recipe` whose 16K stage is Lighthouse for 62.5 % of its steps, then dense, with one optimiser.

    Source: the split and the dense layers at both ends are those of Lighthouse Attention, arXiv 2605.06554.
    """
    recipe = byte_recipe(seed)
    stages = list(recipe.stages)
    at = next(i for i, stage in enumerate(stages) if stage.name == "dense 16K")
    stages[at] = dataclasses.replace(
        stages[at], name="lighthouse 16K", attention="lighthouse", method=LIGHTHOUSE, dense_ends=1,
        dense_after=stages[at].steps * 5 // 8,
    )  # fmt: skip
    return dataclasses.replace(recipe, stages=tuple(stages))


RECIPES = {"bytes": byte_recipe, "bytes-hisa": hisa_aware_recipe, "lighthouse": lighthouse_recipe}
