# %% [markdown]
# # A block score of one's own
#
# HISA keeps blocks by a score of what stands for each: by default the mean of its keys, scored by the indexer's
# formula. Both may be functions of one's own. This tutorial tries two on the queries and keys of a trained model, and
# compares them with the flat indexer. It needs `pip install 'hisa_jax[models]' matplotlib` and a checkout, where the
# model is.

# %%
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx

import hisa_jax as hj
from hisa_jax import models

# %% [markdown]
# ## What the indexers of a model see
#
# `models/bytes` is a small DeepSeek-V3.2 whose tokens are bytes. It reads 1536 bytes of a Python source, and
# `trace=True` hands out the index queries, keys and head weights of each of its 8 layers. We ask for the selections of
# every 16th query of the second half.

# %%
model = models.from_pretrained("bytes")
text = Path(functools.__file__).read_bytes()[:1536]
graph, state = nnx.split(model)


@jax.jit
def index_inputs(state, ids):
    out = nnx.merge(graph, state).run(ids, trace=True, last_only=True)
    return [layer.index_inputs for layer in out.layers]


positions = jnp.arange(768, 1536, 16)[None]  # [B, T]
layers = [(q[:, 768::16], k, w[:, 768::16]) for q, k, w in index_inputs(state, jnp.array([list(text)]))]
print(len(layers), "layers, q, k, w:", *(x.shape for x in layers[0]))

# %% [markdown]
# ## Two scores
#
# A method takes two functions. `pool` makes what stands for a block, a vector of any length, from the block's keys.
# `block_score` scores some of these for one query. All arguments are float32.
#
# The first is Quest's ([arXiv 2406.10774](https://arxiv.org/abs/2406.10774)): the least and the greatest number of each
# feature. They bound what any key of the block could score.


# %%
def bounds(keys):  # [block_size, D] -> [2 D]
    return jnp.concatenate([keys.min(0), keys.max(0)])


def most(q, blocks, w):  # [H, D], [s, 2 D], [H] -> [s]
    least, greatest = jnp.split(blocks, 2, axis=1)
    products = jnp.maximum(q[:, None] * least, q[:, None] * greatest).sum(2)  # [H, s]
    return jnp.maximum(w, 0) @ jnp.maximum(products, 0)


# %% [markdown]
# The second cuts a block into four parts, and scores it by the best of their means. A single token weighs four times as
# much in the mean of a part.


# %%
def quarters(keys):  # [block_size, D] -> [4 D]
    return keys.reshape(4, -1, keys.shape[1]).mean(1).ravel()


def best_quarter(q, blocks, w):  # [H, D], [s, 4 D], [H] -> [s]
    means = blocks.reshape(len(blocks), 4, -1)
    products = jnp.einsum("hd,spd->hsp", q, means)
    return jnp.einsum("h,hsp->sp", w, jnp.maximum(products, 0)).max(1)


# %% [markdown]
# ## Comparing
#
# Each method keeps 16 blocks of 16 tokens and chooses 64 of their 256 tokens. The flat indexer chooses 64 of all.

# %%
sizes = dict(topk=64, block_size=16, block_topk=16)
methods = {
    "mean (HISA's own)": hj.Hisa(**sizes),
    "bounds (Quest)": hj.Hisa(**sizes, pool=bounds, block_score=most),
    "best of four means": hj.Hisa(**sizes, pool=quarters, block_score=best_quarter),
}


@functools.partial(jax.jit, static_argnames="method")
def recall(layer, method):
    select = functools.partial(hj.select, *layer, query_positions=positions)
    return hj.compare(select(method), select(hj.Dsa(topk=64))).recall.mean()


found = {name: np.array([recall(layer, method) for layer in layers]) for name, method in methods.items()}
for name, of_layers in found.items():
    print(f"{name:20}", *(f"{x:.2f}" for x in of_layers), f"  mean {of_layers.mean():.3f}")
assert min(found, key=lambda name: found[name].mean()) == "bounds (Quest)"

# %%
figure, axis = plt.subplots(figsize=(8, 3.2))
for i, (name, of_layers) in enumerate(found.items()):
    axis.bar(np.arange(len(layers)) + 0.27 * (i - 1), of_layers, 0.25, label=name)
axis.set(xlabel="layer", ylabel="recall of flat's tokens", ylim=(0, 1.3), title="Block scores on a trained model")
axis.legend(loc="upper center", ncols=3)
figure.tight_layout()
plt.show()

# %% [markdown]
# The bounds are the worst here. These keys have 64 features, and no token of a block has the best of each. Four means
# are a little better than one, and cost four times as much to score. Another model may differ, so try it on yours.
#
# ## Inside the model
#
# Such a method works wherever a method does. Here the model continues the text with it, and reports each layer's
# recall. It chooses 128 of 256 tokens. The flat indexer, which it is measured against, chooses 128 of all.

# %%
own = hj.Hisa(topk=128, block_size=16, block_topk=16, pool=quarters, block_score=best_quarter)
result = models.generate(model.with_method(own), [list(text[:768])], 16, chunk=256, report_recall=True)
print("continued by:", bytes(result.tokens[0]))
print("recall by layer, decoding:", [round(value, 2) for value in result.recall["decode"]])

# %% [markdown]
# What is promised of such functions, what they may do, and an indexer from the stages: [research](../research.md).
