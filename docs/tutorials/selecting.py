# %% [markdown]
# # Selecting in ten minutes
#
# Sparse attention reads a few tokens of a long text. An *indexer* chooses them: it scores every earlier token for every
# query, and the best `topk` are read. This tutorial makes a text, chooses tokens by four methods, and looks at what
# each of them finds and misses. It needs `pip install hisa_jax matplotlib`.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import hisa_jax as hj

# %% [markdown]
# ## A text to search
#
# A real model makes an index key of each token, and index queries with head weights of each query. Here we make them
# ourselves, so that we know what should be found. The text has 4096 tokens, and keys are noise at first. Then a topic
# is put into the text in two ways:
#
# - four **passages** of 32 tokens, all of them about the topic;
# - 64 **single tokens** about the topic, far from each other.
#
# The last 8 tokens of the text ask for the topic. So the right 192 tokens are known.

# %%
S, T, H, D = 4096, 8, 4, 64  # tokens, queries, index heads, size of a head
rng = np.random.default_rng(0)
topic = rng.normal(size=D) / np.sqrt(D)

passages = np.concatenate([start + np.arange(32) for start in (512, 1280, 2304, 3328)])
others = np.setdiff1d(np.arange(32, S - 64), passages)
singles = np.sort(rng.choice(others, 64, replace=False))
wanted = np.sort(np.concatenate([passages, singles]))

keys = rng.normal(size=(S, D)) / np.sqrt(D)
keys[wanted] += topic
k = jnp.asarray(keys, jnp.float32)[None]  # [B, S, D]
q = jnp.asarray(topic + 0.3 * rng.normal(size=(T, H, D)) / np.sqrt(D), jnp.float32)[None]  # [B, T, H, D]
w = jnp.full((1, T, H), 1 / H)  # [B, T, H]

# %% [markdown]
# ## Choosing
#
# `hj.select` takes the arrays and a method. `hj.Dsa` is the flat indexer of DeepSeek-V3.2: it scores all tokens by all
# heads and keeps the best. It is exact, so the others are measured against it. The result has the positions of each
# query's tokens in ascending order, and how many are real.

# %%
TOPK = 192
flat = hj.select(q, k, w, hj.Dsa(topk=TOPK), return_scores=True)
print("indices", flat.indices.shape, "count", flat.count[0])
print("the last query's first tokens:", flat.indices[0, -1, :8])
share = np.isin(wanted, flat.indices[0, -1]).mean()
print(f"of the tokens about the topic it has {share:.0%}")
assert share > 0.9

# %% [markdown]
# The other methods do less work. HISA scores the mean of each block of tokens, keeps the best blocks, and chooses among
# their tokens. The scan scores all tokens by one cheap head, and chooses among the best. Block-sparse takes whole
# blocks. All methods below choose 192 tokens. HISA and the scan choose them among 768.

# %%
methods = {
    "flat": hj.Dsa(topk=TOPK),
    "HISA": hj.Hisa(topk=TOPK, block_size=32, block_topk=24),
    "scan": hj.Scan(topk=TOPK, candidates=768, exact_heads=1),
    "block-sparse": hj.BlockSparse(topk=TOPK, block_size=32),
}
selections = {name: hj.select(q, k, w, method) for name, method in methods.items()}
print(f"{'':14}recall  passages  single tokens")
for name, selection in selections.items():
    recall = hj.compare(selection, flat).summary()["recall"]
    chosen = np.asarray(selection.indices[0, -1])
    of_passages, of_singles = np.isin(passages, chosen).mean(), np.isin(singles, chosen).mean()
    print(f"{name:14}{recall:6.2f}{of_passages:10.0%}{of_singles:15.0%}")

# %% [markdown]
# **Recall** is the share of the flat indexer's tokens that a method has, as a mean over queries. All methods find the
# passages: the mean of such a block is the topic. A single token hardly moves the mean of its block. So HISA misses
# half of these and block-sparse all, and the scan, which looks at every token, finds them. This is the choice between
# them on real models, too: [quality](../quality.md) has the figures.
#
# ## A picture
#
# Each row is a method, each line a token that the last query attends to.

# %%
figure, axes = plt.subplots(len(methods) + 1, 1, figsize=(9, 3.6), sharex=True)
axes[0].vlines(passages, 0, 1, color="tab:orange", lw=0.6)
axes[0].vlines(singles, 0, 1, color="tab:red", lw=0.9)
axes[0].set_ylabel("wanted", rotation=0, ha="right", va="center")
for axis, (name, selection) in zip(axes[1:], selections.items(), strict=True):
    axis.vlines(np.asarray(selection.indices[0, -1]), 0, 1, color="tab:blue", lw=0.6)
    axis.set_ylabel(name, rotation=0, ha="right", va="center")
for axis in axes:
    axis.set(xlim=(0, S), yticks=[])
axes[-1].set_xlabel("position in the text; above, orange: passages, red: single tokens")
figure.suptitle("What each method selects")
figure.tight_layout()
plt.show()

# %% [markdown]
# ## Under jit
#
# Shapes are static, and methods are values that can be compared and hashed. So a call compiles once, whatever the
# positions are. By default the queries are the last tokens of the text. `query_positions` says otherwise, and -1 is
# padding, which selects nothing. Nobody sees a token after its own.


# %%
@jax.jit
def choose(q, k, w, positions):
    return hj.select(q, k, w, methods["scan"], query_positions=positions)


positions = jnp.array([[100, 600, 1500, 2500, 3400, 4095, -1, -1]])
early = choose(q, k, w, positions)
print("count:", early.count[0])
print("latest token of each:", early.indices.max(-1)[0])
assert (early.indices.max(-1) <= positions).all()

# %% [markdown]
# ## Attending
#
# `hj.sparse_mla` is the attention that reads a selection. It takes queries of 16 heads, and one latent a token, of
# which the first `value_dim` numbers are the values.

# %%
latents = jax.random.normal(jax.random.key(1), (1, S, 96))
heads = jax.random.normal(jax.random.key(2), (1, T, 16, 96))
out = hj.sparse_mla(heads, latents, selections["scan"].indices, value_dim=64, scale=96**-0.5)
print("attention:", out.shape)

# %% [markdown]
# What can run here, and why the rest cannot:

# %%
for name, reason in hj.implementations().items():
    print(f"{name:12}{reason or 'can'}")

# %% [markdown]
# Next: [a block score of one's own](block_score.py), or the methods in a model, [from a checkpoint to a served
# answer](serving.py).
