"""What docs/replay.md shows and states is so. Four compiled programs in the gate."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from hisa_jax import models

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/replay.md").read_text()
EXAMPLE, LOSS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def names():
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        exec(EXAMPLE, found := {})
    return found


def test_the_ten_lines_run_and_show_what_they_promise(names):
    assert len([line for line in EXAMPLE.splitlines() if line]) <= 10
    out = names["run"](names["state"], names["rollout"])
    report = models.replay_report(names["rollout"], out)
    assert report.logprob_change < 1e-5 and 0.2 < report.choice_share < 0.3


def test_without_replay_logprobs_are_others(names):
    r, graph = names["rollout"], names["graph"]
    run = jax.jit(lambda s, t, to: models.training_forward(nnx.merge(graph, s), t, targets=to).logprobs)
    # Padding is on the right, where no query sees it.
    assert abs(run(names["state"], r.tokens, r.targets) - r.logprobs)[r.is_made].max() > 1e-2


@pytest.mark.exhaustive
def test_the_loss_reaches_every_weight(names):
    exec(LOSS, names)
    flat = nnx.to_flat_state(names["gradient"])
    assert all(jnp.isfinite(x[...]).all() for _, x in flat)
    assert all(bool(jnp.any(x[...])) != ("router_bias" in path) for path, x in flat)


def test_a_token_takes_the_bytes_that_the_table_states():
    rows = re.findall(r"^\| (\S+) \| (\d+), (\d+) \| ([\d,]+) \|$", PAGE, re.MULTILINE)
    configs = {"DeepSeek-V3.2": models.dsv32(), "GLM-5": models.glm5(), "GLM-5.2": models.glm52()}
    assert [row[0] for row in rows] == list(configs)
    for name, n_selecting, n_routed, size in rows:
        config = configs[name]
        of = config.indexer_kinds.count("full"), config.layer_kinds.count("sparse")
        assert of == (int(n_selecting), int(n_routed))
        assert int(size.replace(",", "")) == 17 + 4 * (of[0] * config.index_topk + of[1] * config.num_experts_per_tok)
