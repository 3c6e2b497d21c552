# %% [markdown]
# # Training an indexer with replayed selections
#
# A server makes answers, a trainer learns from them. Both have the same weights, but the server selects by another
# indexer. Then the trainer's log-probabilities are those of another attention. *Replay* runs in the trainer exactly
# what the server's queries selected. This tutorial makes rollouts with HISA, replays them, and trains the indexers on
# them. It needs `pip install 'hisa_jax[models]' matplotlib` and a checkout, where the model is.

# %%
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

import hisa_jax as hj
from hisa_jax import models
from hisa_jax.models.locate import locate

# %% [markdown]
# ## Rollouts
#
# The trainer is the small model of the repository with its flat indexer. It selects 64 tokens here, so that short texts
# leave a choice. The server has the same weights and selects by HISA. `return_selections=True` hands out a `Rollout`:
# tokens, log-probabilities, and what each query selected in each layer.

# %%
config = models.read_config(locate("bytes"), {"index_topk": 64})
trainer = models.from_pretrained("bytes", config=config)
server = trainer.with_method(hj.Hisa(topk=64, block_size=16, block_topk=8))

text = Path(functools.__file__).read_bytes()
prompts = [list(text[start : start + 224]) for start in (0, 4000, 9000, 14000)]
made = models.generate(server, prompts, 32, chunk=128, stop_ids=(), return_selections=True)
rollout = made.rollout
print("tokens", rollout.tokens.shape, "selections of a layer", rollout.indices[0].shape)
print(f"{rollout.bytes_per_token:,.0f} bytes a token")

# %% [markdown]
# ## Replay
#
# `models.training_forward` runs whole sequences, differentiable. With `selections=` it attends to the rollout's tokens.
# We compare its log-probabilities with the server's, with replay and without.

# %%
graph, indexers, rest = nnx.split(trainer, lambda path, _: "indexer" in path, ...)


def run(indexers, rollout, **options):
    return models.training_forward(nnx.merge(graph, indexers, rest), rollout.tokens, **options)


replayed = jax.jit(lambda indexers, r: run(indexers, r, selections=r, compare=True))
alone = jax.jit(lambda indexers, r: run(indexers, r, targets=r.targets))

out = replayed(indexers, rollout)
is_made = np.asarray(rollout.is_made)
wrong = {
    name: np.abs(np.asarray(x.logprobs) - rollout.logprobs)[is_made]
    for name, x in (("with replay", out), ("without", alone(indexers, rollout)))
}
for name, of_tokens in wrong.items():
    print(f"{name:12}: log-probabilities differ by up to {of_tokens.max():.0e}")
report = models.replay_report(rollout, out)
print(f"queries with a choice that would have selected just the same: {report.choice_share:.0%}")
assert wrong["with replay"].max() < 1e-3

# %% [markdown]
# ## Training
#
# `out.kl` is what the indexers learn from: of each layer and query, how far the indexer's scores are from the
# attention, over the tokens that the rollout selected. No other parameter gets a gradient of it.
#
# The indexers of this model are trained already. So that there is something to learn, we disturb them by noise of half
# their weights' spread. Three rollouts train them, the fourth is held out.

# %%
noisy = jax.tree.map(lambda x: x + 0.5 * jnp.std(x) * jax.random.normal(jax.random.key(x.size), x.shape), indexers)


def rows(of):
    return jax.tree.map(lambda x: x[of], rollout)


training, held_out = rows(slice(0, 3)), rows(slice(3, 4))


def loss(indexers, rollout):
    return run(indexers, rollout, selections=rollout).kl.mean()


optimizer = optax.adam(1e-4)


@jax.jit
def step(indexers, state):
    value, gradient = jax.value_and_grad(loss)(indexers, training)
    updates, state = optimizer.update(gradient, state)
    return optax.apply_updates(indexers, updates), state, value


learnt, state, losses = noisy, optimizer.init(noisy), []
for _ in range(16):
    learnt, state, value = step(learnt, state)
    losses.append(float(value))
held = jax.jit(loss)
before, after, intact = (float(held(x, held_out)) for x in (noisy, learnt, indexers))
print(f"KL of the training rollouts: {losses[0]:.3f}, after {len(losses)} steps {losses[-1]:.3f}")
print(f"KL of the one held out:      {before:.3f}, then {after:.3f}; the undisturbed indexers have {intact:.3f}")
assert losses[-1] < losses[0] and after < before

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
for name, of_tokens in wrong.items():
    left.semilogy(np.sort(np.maximum(of_tokens, 1e-8)), label=name)
left.set(title="difference from the server", xlabel="new tokens, in order of it", ylabel="of the log-probability")
left.legend()
right.plot(losses, marker="o", label="training rollouts")
right.plot([0, len(losses) - 1], [before, after], "s", label="the one held out")
right.axhline(intact, color="grey", ls=":", label="held out, undisturbed indexers")
right.set(title="indexers that learn from rollouts", xlabel="step", ylabel="KL from the attention", ylim=0)
right.legend()
figure.tight_layout()
plt.show()

# %% [markdown]
# ## Back to the server
#
# The server takes the new indexers as any weights. Parameters that are no indexer's are the same as before.

# %%
better = nnx.merge(graph, learnt, rest).with_method(server.plan(0, "decode"))
answer = models.generate(better, prompts, 32, chunk=128, stop_ids=()).tokens[0]
print(bytes(answer).decode(errors="replace"))

# %% [markdown]
# A loss on the answers is a line more: [selection replay](../replay.md) has it, packing, meshes, and what is refused.
