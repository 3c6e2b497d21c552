"""An engine on a mesh of several processes; test_engine_meshes.py starts each of them in this module."""

import os
import sys

import jax
import jax.experimental.multihost_utils

jax.config.update("jax_num_cpu_devices", 1)
jax.config.update("jax_disable_most_optimizations", True)

import numpy as np  # noqa: E402

from hisa_jax import models  # noqa: E402
from hisa_jax.models.engine import Engine, lookup  # noqa: E402

HEARTBEAT_TIMEOUT_S, TIMEOUT_S = 10, 240


def engine(timeout_s=TIMEOUT_S, draft=lookup, **options):
    """Over two devices the pages of a request, over the others requests."""
    mesh = models.make_mesh(data=jax.process_count() // 2, context=2)
    sizes = dict(n_pages=48, rows=4, prefill_rows=4, max_length=64, chunk=serving.CHUNK, n_draft=2)
    return Engine(serving.model(mesh=mesh), **sizes | options, draft=draft, process_timeout_s=timeout_s)


def submitted(e, n=10):
    """The tokens that each of some requests must get, by number."""
    prompts = tuple(map(tuple, serving.requests(n, seed=1)))
    return {e.submit(p, serving.N_NEW, ()): t for p, t in zip(prompts, right(prompts), strict=True)}


def right(prompts):
    return serving.alone(prompts, stop_ids=())


def error_of(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("no error")


def tokens_are_those_of_one_device_with_one_cancelled():
    e = engine()
    wanted = submitted(e)
    e.step()
    e.step()
    del wanted[0]
    assert e.cancel(0)
    assert serving.finish(e) == (wanted, {})
    e.release()
    assert e.pool.n_free == e.pool.n_pages
    print("served:", len(wanted), flush=True)


def another_config_is_an_error_on_all():
    """Sizes of the engine, or of the model."""
    print("refused:", error_of(lambda: engine(rows=4 + 4 * (jax.process_index() == 1))), flush=True)
    method = serving.SCAN if jax.process_index() == 1 else serving.HISA
    mesh = models.make_mesh(context=jax.process_count())
    made = serving.model(method=method, mesh=mesh)
    print("refused:", error_of(lambda: Engine(made, n_pages=48, max_length=64)), flush=True)


def requests_that_differ_are_an_error_on_all_and_without_them_they_go_on():
    e = engine()
    bad = e.submit([7, 7, jax.process_index()], serving.N_NEW, ())
    wanted = submitted(e, 4)
    print("refused:", error_of(e.step), flush=True)
    e.pool.check()
    assert e.cancel(bad)
    assert serving.finish(e) == (wanted, {})
    print("went on", flush=True)


def a_step_that_raises_on_one_process_is_done_again_by_all():
    """An interrupt in a draft, which the others do not see, among prompts that are read in the same step."""
    pressed = [jax.process_index() == 1]

    def draft(tokens, n):
        if pressed and pressed.pop():
            raise KeyboardInterrupt
        return lookup(tokens, n)

    e, tokens, n_errors = engine(draft=draft), {}, 0
    wanted = submitted(e)
    while not e.is_idle:
        try:
            tokens |= e.step().finished
        except (KeyboardInterrupt, RuntimeError):
            n_errors += 1
            assert n_errors < 4
        e.pool.check()
    assert tokens == wanted and n_errors >= 1
    print("done again", flush=True)


def a_process_that_makes_no_step_is_an_error_on_those_that_do():
    e = engine(timeout_s=4)
    submitted(e, 2)
    if jax.process_index() == 0:
        print("refused:", error_of(e.step), flush=True)
    jax.experimental.multihost_utils.sync_global_devices("later")
    if jax.process_index() != 0:
        print("refused:", error_of(e.step), flush=True)


def a_process_that_dies_ends_the_others():
    e = engine()
    submitted(e)
    e.step()
    if jax.process_index() == 1:
        os._exit(3)
    while True:
        np.asarray(e.step().steps)


if __name__ == "__main__":
    port, n, i, *promises = sys.argv[1:]
    jax.distributed.initialize(
        f"localhost:{port}", int(n), int(i), initialization_timeout=60, heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S
    )
    # Not above: it makes arrays when it is imported.
    from tests.models import serving

    for promise in promises:
        globals()[promise]()
        print("kept:", promise, flush=True)
