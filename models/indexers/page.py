"""Writes docs/indexers.md from the table, so that the page says what the modules do.

python -m hisa_jax.models.indexers.page > docs/indexers.md
"""

import textwrap
from collections.abc import Iterator
from typing import Any

import hisa_jax as hj
from hisa_jax import dispatch
from hisa_jax.models.indexers.table import FAMILIES, Family

# The sizes that the models publish, by which the page shows their methods.
PUBLISHED: dict[str, dict[str, int]] = {
    **{name: dict(topk=2048) for name in FAMILIES},
    "glm5_next": dict(topk=2048, pool=4),
    "deepseek_v4": dict(topk=512, pool=4),
    "qwen4_exp": dict(budget=2048, pool=4),
    "minimax_m3": dict(block_size=128, blocks_kept=16, local_blocks=1),
}

_SOURCE = hj.BlockSparse(topk=16384, block_size=8, keep_first=0, scored_by="max")
_TOKENS = 131072
_H200 = dispatch.Device(platform="gpu", kind="NVIDIA H200", compute_capability="9.0")
_DEVICES = {
    "mosaic_gpu": _H200,
    "triton": _H200,
    "mosaic_tpu": dispatch.Device(platform="tpu", kind="TPU v6 lite"),
}

_HEAD = """# Indexers of other models

Models whose attention is sparse choose by indexers that differ in a few things: what their queries and keys are made
of, how many tokens a key stands for, what is done to a product, and what is handed on. Each is a row of a table
([models/indexers/table.py](../models/indexers/table.py)) and a method of [the contract](contract.md), so HISA and the
scan work on all of them, in batches, packed batches, pages, and over a mesh. `hisa_jax.models.indexers.page` writes
this page from that table.

An indexer is a Flax module, made of the tensors of a checkpoint. Of GLM-5.3-Flash, with tiny sizes:

```python
import jax.numpy as jnp
import numpy as np

import hisa_jax as hj
from hisa_jax.models import indexers

shapes = {
    "wq_b.weight": (4 * 16, 24),
    "wk.weight": (16, 40),
    "k_norm.weight": (16,),
    "k_norm.bias": (16,),
    "weights_proj.weight": (4, 40),
    "index_kpool_compress_ape": (4, 16),
    "index_kpool_compress_gate": (16, 40),
}
weights = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
indexer = indexers.from_weights("glm5_next", dict(index_topk=8, index_kpool=4), weights)
hidden, latents = jnp.ones((1, 30, 40)), jnp.ones((1, 30, 24))  # of the attention: its input, its queries' latents
found = indexer(hidden, latents)
assert found.selection.indices.shape == (1, 30, 8 + 4 - 1)  # the tokens of 2 pools, then those of the open one

hisa = hj.Hisa(topk=2, block_size=2, block_topk=3, entry_size=4, tail="open")  # over pools: blocks of 2 of them
found = indexer(hidden, latents, method=hisa)

cache = indexer.init_cache(batch=1, capacity=64, room=4)  # of which up to 4 tokens at a time may be taken back
found = indexer(hidden, latents, cache=cache)
cache = found.cache.truncate(found.cache.lengths - 2)
```

Indexers with RoPE want `cos` and `sin` of each token's position, too. Sizes may be a whole config.json, of which other
keys are not read; the number of heads follows from the tensors, whose names may be those of the published checkpoint.

## Models

With queries and keys in hand a model is one line: `hj.select(q, k, w, method)`, by the method of its row in the second
table; where it has no weights, `w` is None.
"""

_TAIL = """
`models.from_pretrained` builds the whole stack of the first two. For a config.json of the others it names the module.

## By hand

The contract takes queries and keys as they are; `hj.select` needs no module. Numbers of a method count keys, which are
entries where `entry_size` is above 1.

| what | how |
|---|---|
| pools of 4, their members handed on, then the open pool's tokens | `hj.Dsa(topk=512, entry_size=4, tail="open")` |
| HISA over pools | `hj.Hisa(topk=512, block_size=32, block_topk=64, entry_size=4, tail="open")` |
| the scan over pools | `hj.Scan(topk=512, entry_size=4, tail="open")` |
| windows of 4 by their numbers, for compressed attention | `hj.Dsa(topk=512, entry_size=4, returns="entries")` |
| no activation | `hj.Dsa(activation=None)` |
| no head weights | `hj.select(q, k, None, method)` |
| a choice a head | `hj.Dsa(topk=2048, per_head=True)`: `indices` [B, T, H, topk] |
| blocks by their best token | `hj.BlockSparse(scored_by="max", keep_first=0)`; `return_blocks=True` has the blocks |
| a published list alone, for `Dsa` | `hj.select(..., candidates=hj.CandidateBlocks(blocks, 8))` |
| fewer than `topk`, for each query or sequence | `hj.select(..., budget=budget)` |

DeepSeek-V4.1 chooses in two levels. A source layer publishes blocks of 8, 2048 of them:
`hj.BlockSparse(topk=16384, block_size=8, keep_first=0, scored_by="max")` with `return_blocks=True`. Later layers choose
inside: `hj.Dsa(topk=512)` with `candidates=hj.CandidateBlocks(blocks, 8)`.

How fast HISA and the scan are over pools at 1M tokens, what they find, and what goes together with other ways to score
less: [together.md](together.md).

Keys of entries have a cache of their own: `hj.init_cache(..., entry_size=4)`. `append` takes a row a token and writes
an entry when its last token arrives, from that token's row. Lengths count tokens everywhere; so does `truncate`.

## Left and right padding

A sequence begins with its first token, at position 0, wherever padding stands: entries and blocks start there. Rows
with fewer visible entries than are wanted hold -1 after them.

## What kernels take

By `hj.implementations`, for batches of bfloat16 with 131,072 tokens, on an H200 and a TPU v6e:
"""

_KERNELS = """
Pools, tails and calls without weights are the kernels' as tokens are. What else differs costs this:

- **Few heads.** Fewer than 16 are repeated until there are 16, each with its share of its weight. Where reading keys
  takes the time, as in decoding, that is free.
- **A choice a head.** A head is a query of one head, so that it is repeated 16 times, but for blocks by their best
  token.
- **No activation.** x = relu(x) - relu(-x): a head becomes two, up to 64 of them, but not in int8.
- **The best token of a block.** A head by itself has a kernel that sums over no heads (`hisa_units`), also in int8
  without an activation. Of several heads GPUs write the sort keys of all tokens, and read the best of each block from
  them. TPUs do all in one kernel, of blocks of 8, 16, 32, 64, 128 or 256 tokens.
- **Lists.** On GPUs blocks of any size become tokens, whose rows are gathered as a scan's candidates are; a list may
  name up to 32,768. On TPUs blocks of 64, 128 or 256 tokens are chosen from as from those that HISA keeps.
- **Budgets.** On GPUs the chosen tokens are scored once more, and each query takes its best. On TPUs their sort keys
  tell; there a scan has no budget. Budgets of blocks, and HISA's `block_ratio`, go by the blocks' sort keys.

One H200, bfloat16, prefills of the last 4096 queries, the span of one call, ms
([rows](../bench/results/h200_limits.json)). The floor is what reading the keys, at the 4.3 TB/s of
copies, or multiplying them takes; reading alone may be a little faster.

| | 128K | floor | of it the kernel, the rest |
|---|--:|--:|---|
| MiniMax-M3, prefill | 1.166 | 0.555 | 1.038; the selection 0.09, index arithmetic 0.04 |
| decode, 1 sequence in pages | 0.0266 | 0.0078 | 0.008; the selection 0.009 |
| 32 | 0.273 | 0.25 | 0.248; the selection 0.009 |
| 128 | 0.990 | 0.999 | 0.953; the selection 0.010 |
| DeepSeek-V4.1's source layer, prefill | 8.30 | 4.44 | 6.80; the best of each block 0.93, the selection 0.27 |
| the same, by Triton | 15.8 | | 13.9 |
| a later layer, prefill from its list | 3.76 | 0.555 | 2.85; two sorts of the list 0.77 |
| the same, by Triton | 3.73 | | 2.19; the selection 0.61, two sorts 0.78 |
| the same, decode, 32 sequences | 0.0840 | 0.0312 | 0.038; two sorts 0.028, the selection 0.007 |

MiniMax-M3's prefill takes 0.587 at 64K. HISA with budgets takes 1.27 at 64K in e4m3, where it takes 0.69 without them:
the chosen tokens' second scores are 0.54, their selection 0.05. With a ratio of 8 it takes 0.693.

MiniMax-M3's prefill took 5.46: a reshape of a tile's scores, before their maximum, had XLA's Triton move them all
through shared memory. Triton by itself does not, so what a kernel becomes is read from XLA's program
(`tests/gpu/test_step.py`). What is left beside products does not depend on tiles; it may be that each warp stores a
maximum for 32 queries in 32 places, which the next product waits for. Stored by columns they would be one line of
memory; that was written and compiled, and not measured.

MiniMax-M3 on TPUs, by the compiler's schedule: [tpu.md](tpu.md#blocks-by-their-best-token).

Keys that are split over devices have the first three by kernels, and the others by `xla`, which takes all everywhere.
"""


def _line(model_type: str, family: Family) -> str:
    queries = {
        "latents": "latents of the queries", "hidden": "hidden states", "normed": "hidden states, normed",
    }[family.queries]  # fmt: skip
    key = {"layer": "LayerNorm", "rms": "RMSNorm", "unit": "RMSNorm, 1 + weight"}[family.key_norm]
    keys = {
        None: key,
        "gated": f"{key} of each; the pool's by the softmax of gates",
        "windows": f"two windows by the softmax of gates, {key}",
        "mean": f"mean of the pool, {key}",
    }[family.pooled]
    pairs = "neighbours" if family.pairs != "halves" else "halves"
    rope = f"{family.rope}, {pairs}" if family.rope else "none"
    weights = "yes" if family.weighs else "none"
    return f"| `{model_type}` | {family.title} | {family.published} | {queries} | {keys} | {rope} | {weights} |"


def _kernel_lines() -> Iterator[str]:
    """Who takes which model, and why the others do not."""
    methods = {
        model_type: (family.method(PUBLISHED[model_type]), int(family.published.split()[0]), 0)
        for model_type, family in FAMILIES.items()
    }
    methods["DeepSeek-V4.1, source"] = _SOURCE, 32, 0
    methods["DeepSeek-V4.1, later"] = hj.Dsa(topk=512), 32, _SOURCE.topk
    for model_type, (method, H, n_listed) in methods.items():
        S = _TOKENS // method.entry_size
        arrays: Any = dict(q_dtype="bfloat16", k_dtype="bfloat16", H=1 if method.per_head else H, D=128, S=S)
        problem = dispatch.Problem(method=method, n_listed=n_listed, listed_size=_SOURCE.block_size, **arrays)
        reasons = [dispatch.reasons(device, problem)[name] for name, device in _DEVICES.items()]
        what = f"`{model_type}`" if model_type in FAMILIES else model_type
        yield f"| {what} | {' | '.join(reason or 'yes' for reason in reasons)} |"


def _lines() -> Iterator[str]:
    yield _HEAD
    yield "| model_type | model | as published | queries of | keys | RoPE: dims, pairs | weights |"
    yield "|---|---|---|---|---|---|---|"
    yield from (_line(model_type, family) for model_type, family in FAMILIES.items())
    yield ""
    yield "| model_type | the method, as published | tensors |"
    yield "|---|---|---|"
    for model_type, family in FAMILIES.items():
        method: hj.Method = family.method(PUBLISHED[model_type])
        tensors = ", ".join(f"`{names[0]}`" for names in family.tensors.values())
        yield f"| `{model_type}` | `hj.{method}` | {tensors} |"
    notes = [(model_type, family.note) for model_type, family in FAMILIES.items() if family.note]
    yield ""
    yield "Where a model's public code, read in transformers 5.24, does otherwise, or needs something said:"
    yield ""
    for model_type, note in notes:
        first, *rest = textwrap.wrap(f"`{model_type}`: {note}", 118, break_on_hyphens=False)
        yield f"- {first}"
        yield from (f"  {line}" for line in rest)
    yield _TAIL
    yield "| model_type | `mosaic_gpu` | `triton` | `mosaic_tpu` |"
    yield "|---|---|---|---|"
    yield from _kernel_lines()
    yield _KERNELS.rstrip()


def page() -> str:
    """The text of docs/indexers.md."""
    return "\n".join(_lines()) + "\n"


if __name__ == "__main__":
    print(page(), end="")
