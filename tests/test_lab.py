"""The lab on a language model, its parts with a tiny random one: what it compares is what the library selects."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

import hisa_jax as hj
from bench.smollm2 import sketches
from bench.smollm2.filters import Sketched, View, chosen
from bench.smollm2.methods import core

T, H, D = 384, 4, 128


def view(seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    q, k = jax.random.normal(keys[0], (T, H, D)), jax.random.normal(keys[1], (T, D))
    return View(q, jax.random.normal(keys[2], (T, H)), k, jnp.arange(1, T + 1))


class Filters(chex.TestCase):
    @parameterized.named_parameters(
        ("flat", hj.Dsa(topk=16)),
        ("hisa", hj.Hisa(topk=16, block_size=32, block_topk=3)),
        ("hisa_ragged", hj.Hisa(topk=16, block_size=40, block_topk=3)),
        ("block_sparse", hj.BlockSparse(topk=64, block_size=16)),
        ("scan", hj.Scan(topk=16, candidates=24)),
        ("scan_units", hj.Scan(topk=16, candidates=48, unit=8)),
        ("scan_plain", hj.Scan(topk=16, candidates=32, unit=4, slopes="plain")),
    )
    def test_masks_are_the_selections_of_the_library(self, method):
        one = view()
        with jax.default_matmul_precision("highest"):
            mask = np.asarray(jax.jit(lambda: chosen(method, one))())
            wanted = hj.select(one.q[None], one.k[None], one.w[None], method)
        found = np.zeros((T, T + 1), bool)
        np.put_along_axis(found, np.asarray(wanted.indices[0]), True, axis=1)  # -1 is the last column
        np.testing.assert_array_equal(mask, found[:, :T])

    def test_every_method_is_the_flat_indexer_where_all_tokens_are_candidates(self):
        one = view(1)
        flat = np.asarray(chosen(hj.Dsa(topk=256), one))
        for name, method in core(256).items():
            if "sparse" not in name and "MISA" not in name and "1." not in name:
                np.testing.assert_array_equal(np.asarray(chosen(method, one)), flat, err_msg=name)


def test_rotation_is_orthogonal_and_sketches_come_near_to_the_keys():
    k = view().k
    turn = sketches.rotation(D)
    np.testing.assert_allclose(turn @ turn.T, np.eye(D), atol=1e-6)
    made = sketches.make(sketches.NAMES, k, jnp.eye(D))
    errors = {name: float(jnp.linalg.norm(x - k) / jnp.linalg.norm(k)) for name, x in made.items()}
    assert errors["8 bits"] < 0.02 < errors["4 bits"] < 0.2 < errors["3 bits"] < errors["2 bits"]
    assert errors["3 bits, Lloyd-Max"] < errors["3 bits"] and errors["2 bits, Lloyd-Max"] < errors["signs"]


def test_a_second_look_at_the_keys_chooses_among_those_that_passed():
    one = view(2)
    one = View(one.q, one.w, one.k, one.visible, {"signs": one.k})
    both = chosen(Sketched(topk=16, candidates=32, sketch="signs", first=64), one)
    np.testing.assert_array_equal(np.asarray(both), np.asarray(chosen(hj.Scan(topk=16, candidates=32), one)))
