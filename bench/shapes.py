"""Real shapes, by name: what benches time, compile checks compile, tests take and tuning tunes.

Sources: the config.json of DeepSeek-V3.2, GLM-5 and GLM-5.2; block size and blocks kept as in HISA, arXiv 2603.28458.
"""

import dataclasses
from typing import Any

import hisa_jax as hj

CONTEXTS = tuple(1024 * size for size in (8, 16, 32, 64, 128, 256, 512, 1024))
MAX_CONTEXT = CONTEXTS[-1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """What indexing and sparse attention see of a model.

    Attributes:
        H, D: index heads and their size.
        topk, block_size, block_topk: those of `Hisa`, which count entries of `entry_size` tokens.
        weighs: whether the index heads have weights.
        mla_heads, mla_dim, mla_value_dim: heads of the sparse attention, size of a key (latent and rope), of a value.
        max_context: tokens the model is published for.
    """

    name: str
    H: int
    D: int
    mla_heads: int
    mla_dim: int
    mla_value_dim: int
    max_context: int
    topk: int
    block_size: int
    block_topk: int
    entry_size: int = 1
    weighs: bool = True

    def methods(self) -> dict[str, hj.Method]:
        """The methods by the names that tables and options use, the flat one first."""
        keys: Any = dict(topk=self.topk, entry_size=self.entry_size, tail="open" if self.entry_size > 1 else None)
        return {
            "dsa": hj.Dsa(**keys),
            "hisa": hj.Hisa(**keys, block_size=self.block_size, block_topk=self.block_topk),
            "scan": hj.Scan(**keys),
            "block-sparse": hj.BlockSparse(**keys, block_size=self.block_size),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """How queries come: `B` sequences, of which each asks with its last `T` tokens."""

    name: str
    B: int
    T: int


DSV32 = Model(
    name="dsv32", H=64, D=128, mla_heads=128, mla_dim=576, mla_value_dim=512, max_context=163_840,
    topk=2048, block_size=128, block_topk=64,
)  # fmt: skip
GLM5 = dataclasses.replace(DSV32, name="glm5", H=32, mla_heads=64, max_context=202_752)
GLM52 = dataclasses.replace(GLM5, name="glm52", max_context=1_048_576)
# Indexers over pools of 4 tokens that choose 2048 tokens; sources: models/indexers/table.py. HISA's blocks have the 128
# tokens of the paper. What attends to the tokens is no matter of theirs.
GLM53_FLASH = dataclasses.replace(GLM52, name="glm53-flash", topk=512, block_size=32, entry_size=4)
QSA = dataclasses.replace(GLM53_FLASH, name="qsa", H=4, weighs=False)
MODELS = {model.name: model for model in (DSV32, GLM5, GLM52)}

PREFILL = Phase(name="prefill", B=1, T=4096)
DECODES = tuple(Phase(name=f"decode{batch}", B=batch, T=1) for batch in (1, 32, 128))
PHASES = {phase.name: phase for phase in (PREFILL, *DECODES)}


def label(context: int) -> str:
    """8192 -> "8K", 1048576 -> "1M", 1000 -> "1000"."""
    for unit, size in (("M", 1 << 20), ("K", 1 << 10)):
        if context % size == 0:
            return f"{context // size}{unit}"
    return str(context)
