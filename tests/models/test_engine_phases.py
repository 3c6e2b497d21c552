"""Methods that differ by phase: an engine's tokens are those of `generate`, whatever was served before.

In the gate on a model of one layer: seven compiled programs.
"""

import numpy as np
import pytest

from bench.serve.engine_faults import failing

from . import serving


def traffic(n, kinds):
    """(prompt, its tokens by `generate` with chunks of the same size), of a model that has layers of these kinds."""
    prompts = serving.requests(n, seed=2)
    alone = serving.alone(tuple(map(tuple, prompts)), serving.by_phase, (), kinds)
    return list(zip(prompts, alone, strict=True))


def submit(engine, traffic):
    return {engine.submit(prompt, serving.N_NEW, ()): tokens for prompt, tokens in traffic}


@pytest.mark.exhaustive
def test_tokens_depend_on_the_prompt_alone_whatever_was_served_before():
    """Each request twice, in another order, some while others run: donors in every state, cut anywhere."""
    engine, tokens, n_shared = serving.engine(serving.model(serving.by_phase), n_pages=24), {}, 0
    order = np.random.default_rng(0).permutation(np.repeat(np.arange(60), 2))
    made = traffic(60, ("dense", "sparse"))
    wanted = submit(engine, [made[i] for i in order])
    while not engine.is_idle:
        report = engine.step()
        tokens |= report.finished
        n_shared += len(report.forks)
    assert tokens == wanted and n_shared > 20


def test_a_request_goes_on_by_the_method_of_each_phase_after_its_pages_were_lost():
    """Tokens of a prompt's last chunk and those that were made are read again as they were."""
    kinds = ("sparse",)
    engine, tokens, n_lost = serving.engine(serving.model(serving.by_phase, kinds)), {}, 0
    wanted = submit(engine, traffic(12, kinds))
    for i in range(10_000):
        if engine.is_idle:
            break
        try:
            with failing("verify", RuntimeError("lost"), is_late=True, nth=1 if i % 9 == 8 else 2):
                tokens |= engine.step().finished
        except RuntimeError:
            n_lost += 1
    assert tokens == wanted and n_lost > 3
