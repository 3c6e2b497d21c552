"""Records on the host: how they are kept pass by pass, packed, checked, and refused. No program is compiled."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import hisa_jax as hj
from hisa_jax import models
from hisa_jax.models.replay.choices import layout_of
from hisa_jax.models.replay.recorder import Recorder, Rows
from hisa_jax.models.training.sparse import Sparse
from tests.models import serving

from . import rollouts

K, T = 8, 6


def rows(start, n, seed):
    """A pass of two rows of T columns, of which the last n are new and see `start` tokens before them."""
    rng = np.random.default_rng([seed, start])
    visible = start + np.arange(1 - (T - n), n + 1)
    indices = [
        [sorted(rng.permutation(max(v, 1))[:K].tolist()) + [-1] * (K - min(max(v, 1), K)) for v in visible]
        for _ in range(2)
    ]
    experts = np.argsort(rng.random((2, T, 4)), axis=-1)[..., :2]
    return Rows((np.array(indices, np.int32), np.array(indices, np.int32)[::-1]), (experts.astype(np.int32),))


def recorded(recorder, id, made=3, n_prompt=8):
    tokens = list(range(1, n_prompt + made + 1))
    recorder.made(id, 0, [-0.5] * made)
    return recorder.rollout([(id, tokens, n_prompt)])


def test_what_is_written_replaces_everything_from_its_position_on():
    """A pass done again, rejected proposals, tokens read anew from 0; and a fork has its donor's first tokens alone."""
    plain, other = (Recorder(serving.model(), 0) for _ in range(2))
    columns = slice(0, T)
    for recorder in (plain, other):
        recorder.write(7, 0, rows(0, T, 1), 0, columns)
    other.write(7, T, rows(T, T, 5), 1, columns)
    other.write(7, T - 2, rows(T, T, 6), 1, slice(0, 3))
    other.write(7, 0, rows(0, T, 1), 0, columns)
    for recorder in (plain, other):
        recorder.write(7, T, rows(T, 4, 2), 0, slice(T - 4, T))
    rollouts.assert_same(recorded(plain, 7), recorded(other, 7))

    before = recorded(plain, 7)
    plain.fork(8, 7, 5)
    plain.write(8, 5, rows(5, 5, 3), 1, slice(T - 5, T))
    fork = recorded(plain, 8)
    for of_fork, of_donor, new in zip(fork.indices, before.indices, rows(5, 5, 3).indices, strict=True):
        np.testing.assert_array_equal(of_fork[0, :5], of_donor[0, :5])
        np.testing.assert_array_equal(of_fork[0, 5:], new[1, T - 5 :])
    rollouts.assert_same(recorded(plain, 7), before)
    plain.keep({7})
    assert plain.ids == {7}


def test_a_model_without_experts_has_none_in_its_record():
    model = serving.model()
    config = dataclasses.replace(model.config, layer_kinds=("dense", "dense"))
    recorder, whole = Recorder(types.SimpleNamespace(plan=model.plan, config=config), 0), Recorder(model, 0)
    for first, n in ((0, T), (T, 4)):
        passed = rows(first, n, 1)
        whole.write(1, first, passed, 0, slice(T - n, T))
        recorder.write(1, first, passed._replace(experts=()), 0, slice(T - n, T))
    rollouts.assert_same(recorded(recorder, 1), dataclasses.replace(recorded(whole, 1), experts=()))


@pytest.mark.parametrize("start", [0, 3, 9, 40])
def test_queries_from_a_position_on_are_kept_in_whatever_passes_they_come(start):
    """3 is in the first of three passes, 9 in the last, 40 beyond."""
    whole, part = Recorder(serving.model(), 0), Recorder(serving.model(), start)
    for recorder in (whole, part):
        for first, n in ((0, T), (T, 3), (T + 3, 1)):
            recorder.write(1, first, rows(first, n, 1), 1, slice(T - n, T))
    all_, late = recorded(whole, 1), recorded(part, 1)
    assert late.start == start and late.skipped == min(start, 10)
    for x, y in zip(all_.indices, late.indices, strict=True):
        np.testing.assert_array_equal(x[:, late.skipped :], y)
    np.testing.assert_array_equal(all_.experts[0], late.experts[0])
    all_.check(serving.model().config)
    late.check(serving.model().config)
    # 17 bytes and, of two layers that select 8 tokens and one of two experts, 4 for each number.
    assert all_.bytes_per_token == 17 + 4 * (8 + 8 + 2)


@pytest.mark.parametrize("start", [0, 4])
def test_packed_rows_hold_every_sequence_once_in_the_order_given(start):
    recorder, n_made = Recorder(serving.model(), start), {1: 3, 2: 1, 3: 4}
    for id, made in n_made.items():
        n = 7 + made
        for first in range(0, n, T):
            m = min(T, n - first)
            recorder.write(id, first, rows(first, m, id), 0, slice(T - m, T))
    single = [recorded(recorder, id, made) for id, made in n_made.items()]
    assert [r.tokens.shape[1] for r in single] == [10, 8, 11]
    padded = models.pack_rollouts(single)
    assert padded.tokens.shape == (3, 11) and padded.skipped == start
    packed = models.pack_rollouts(single, length=20, rows=3, sequences=2)
    assert packed.cu_seqlens.tolist() == [[0, 10, 18], [0, 11, 11], [0, 0, 0]] and packed.skipped == 0
    for r in (padded, packed):
        r.check(serving.model().config)
        for i, one in enumerate(single):
            b, t = np.nonzero(r.sequence == i)
            for name in ("tokens", "targets", "logprobs", "is_made"):
                np.testing.assert_array_equal(getattr(r, name)[b, t], getattr(one, name)[0])
            np.testing.assert_array_equal(r.experts[0][b, t], one.experts[0][0])
            for x, y in zip(r.indices, one.indices, strict=True):
                rest = x[b[start:], t[start:] - r.skipped]
                np.testing.assert_array_equal(rest[:, : y.shape[2]], y[0])
                assert (rest[:, y.shape[2] :] == -1).all()
        assert (r.tokens[r.sequence < 0] == 0).all() and not r.is_made[r.sequence < 0].any()
    # What was packed is packed again.
    rollouts.assert_same(models.pack_rollouts([packed]), padded)
    # Of one shape, whatever comes.
    again = models.pack_rollouts(single[:1], length=20, rows=3, sequences=2)
    assert jax.tree.map(np.shape, again) == jax.tree.map(np.shape, packed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 5}, "length=5, wanted at least 6, the longest sequence without its last"),
        ({"length": 6, "rows": 1}, "rows=1, wanted at least 2 of length=6"),
        ({"length": 0}, "length=0, wanted an int of at least 1"),
        ({"sequences": True}, "sequences=True, wanted an int"),
    ],
)
def test_sizes_into_which_rollouts_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=f"pack_rollouts: {message}"):
        models.pack_rollouts([rollouts.by_hand()] * 2, **options)
    for bad, what in (([], r"rollouts is \[\], wanted"), ([1], r"rollouts is \[1\], wanted")):
        with pytest.raises(ValueError, match=what):
            models.pack_rollouts(bad)
    with pytest.raises(ValueError, match=r"rollouts\[1\] has .* \(\(3, 3\), 2, .*wanted \(\(3, 3\), 0"):
        models.pack_rollouts([rollouts.by_hand(), rollouts.by_hand(start=2)])


HAND = rollouts.by_hand()
FIRST, SECOND = HAND.indices
# What is changed in a record by hand, and what is said.
BAD_SHAPES = {
    "targets": ({"targets": HAND.targets[:, 1:]}, r"selections.targets is \[1, 5\], wanted \[1, 6\]: those of"),
    "logprobs": ({"logprobs": HAND.logprobs[0]}, r"selections.logprobs is \[6\], wanted \[1, 6\]"),
    "offsets": ({"cu_seqlens": HAND.cu_seqlens[0]}, r"selections.cu_seqlens is \[2\], wanted \[1, R \+ 1\]"),
    "no_sequence": ({"cu_seqlens": HAND.cu_seqlens[:, :1]}, r"cu_seqlens is \[1, 1\], wanted R of 1 or more"),
    "layers": (
        {"indices": (FIRST,)},
        r"selections.indices has 1 layers, wanted 2: one for each that selects, \[0, 1\]",
    ),
    "topk": ({"topk": (3,)}, r"selections.topk has 1 layers, wanted 2"),
    "expert_layers": (
        {"experts": HAND.experts * 2},
        r"experts has 2 layers, wanted 1: one for each that has experts, \[1\]",
    ),
    "experts": (
        {"experts": (HAND.experts[0][..., :1],)},
        r"selections.experts\[0\] is \[1, 6, 1\], wanted \[1, 6, 2\]",
    ),
    "batch": (
        {"indices": (FIRST, np.tile(SECOND, (2, 1, 1)))},
        r"indices\[1\] is \[2, 6, 3\], wanted \[1, T - skipped, K\]",
    ),
    "columns": ({"indices": (FIRST, SECOND[:, 1:])}, r"indices\[1\] is \[1, 5, 3\], wanted \[1, 6, K\]"),
    "start": ({"indices": (FIRST[:, 3:],) * 2, "start": 2}, r"indices\[0\] is \[1, 3, 3\], wanted \[1, 6 or 4, K\]"),
}
BAD_VALUES = {
    "future": (
        {"indices": (FIRST, rollouts.changed(SECOND, (0, 4, 2), 5))},
        r"selections.indices\[1\]\[0, 4\] selects 5, wanted -1 or positions from 0 to 4, which its query sees",
    ),
    "below": ({"indices": (rollouts.changed(FIRST, (0, 4, 0), -2), SECOND)}, r"\[0\]\[0, 4\] selects -2, wanted"),
    "twice": ({"indices": (rollouts.changed(FIRST, (0, 5, 0), 4), SECOND)}, r"\[0\]\[0, 5\] selects a token twice"),
    "nothing": ({"indices": (FIRST, rollouts.changed(SECOND, (0, 3), -1))}, r"indices\[1\]\[0, 3\] selects nothing"),
    "other_sequence": (
        {"cu_seqlens": np.array([[0, 3, 6]], np.int32)}, r"indices\[0\]\[0, 3\] selects 1, wanted .* from 0 to 0,"
    ),
    "offsets": ({"cu_seqlens": np.array([[0, 7]], np.int32)}, r"cu_seqlens\[0\] is \[0, 7\], .* at most 6"),
    "token": ({"targets": rollouts.changed(HAND.targets, (0, 1), 61)}, r"targets\[0, 1\] is 61, .* from 0 to 60"),
    "expert": (
        {"experts": (rollouts.changed(HAND.experts[0], (0, 2, 1), 4),)},
        r"experts\[0\]\[0, 2\] is \[0, 4\], wanted numbers from 0 to 3, each once",
    ),
    "same_expert": ({"experts": (rollouts.changed(HAND.experts[0], (0, 2, 1), 0),)}, r"\[0\]\[0, 2\] is \[0, 0\]"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"), [*BAD_SHAPES.values(), *BAD_VALUES.values()], ids=[*BAD_SHAPES, *BAD_VALUES]
)
def test_what_does_not_fit_is_named(changes, message):
    r, model = rollouts.by_hand(**changes), rollouts.trainer()
    for call, run in (
        ("Rollout.check", lambda: r.check(model.config)),
        ("training_forward", lambda: models.training_forward(model, r.tokens, selections=r)),
    ):
        with pytest.raises(ValueError, match=f"^{call}: .*{message}"):
            run()


def test_dtypes_other_tokens_and_arguments_that_exclude_each_other_are_named():
    model, r = rollouts.trainer(), HAND
    run = functools.partial(models.training_forward, model)
    with pytest.raises(TypeError, match=r"selections.indices\[0\] is int64, wanted int32"):
        run(r.tokens, selections=rollouts.by_hand(indices=(FIRST.astype(np.int64), SECOND)))
    with pytest.raises(TypeError, match="selections is dict, wanted a Rollout"):
        run(r.tokens, selections={})
    with pytest.raises(ValueError, match=r"tokens is \[1, 5\], wanted \[1, 6\]: the shape of selections.tokens"):
        run(r.tokens[:, 1:], selections=r)
    with pytest.raises(
        ValueError, match=r"tokens\[0, 3\] is 9, wanted 4: the selections were recorded of other tokens"
    ):
        run(rollouts.changed(r.tokens, (0, 3), 9), selections=r)
    with pytest.raises(ValueError, match="cu_seqlens and selections, wanted one of them"):
        run(r.tokens, selections=r, cu_seqlens=r.cu_seqlens)
    with pytest.raises(ValueError, match=r"training_forward: cu_seqlens\[0\] is \[0, 4, 3\], wanted ascending"):
        run(r.tokens, cu_seqlens=np.array([[0, 4, 3]], np.int32))
    with pytest.raises(ValueError, match="compare=True without selections"):
        run(r.tokens, compare=True)
    with pytest.raises(ValueError, match=r"targets is \[1, 5\], wanted \[1, 6\]"):
        run(r.tokens, targets=r.targets[:, 1:])
    with pytest.raises(TypeError, match="tokens is float32, wanted int32"):
        run(r.tokens.astype(np.float32))
    for call, make in (
        ("generate", lambda **options: models.generate(model, [[1]], 1, **options)),
        ("Engine", lambda **options: models.Engine(model, n_pages=8, max_length=64, **options)),
    ):
        with pytest.raises(ValueError, match=f"{call}: selections_from=3 without return_selections"):
            make(selections_from=3)
        with pytest.raises(ValueError, match=f"{call}: selections_from=-1, wanted an int of at least 0"):
            make(return_selections=True, selections_from=-1)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["future", "below", "nothing", "expert"])
def test_under_jit_checked_names_it_and_without_nothing_unseen_is_read(name):
    changes, _ = BAD_VALUES[name]
    bad, model = rollouts.by_hand(**changes), rollouts.trainer()
    graph, state = nnx.split(model)

    @jax.jit
    def run(state, r, tokens):
        return models.training_forward(nnx.merge(graph, state), tokens, selections=r).logprobs

    with pytest.raises(
        jax.experimental.checkify.JaxRuntimeError, match=r"training_forward: selections\.(indices|experts)\["
    ):
        hj.checked(run)(state, bad, bad.tokens)
    np.testing.assert_allclose(hj.checked(run)(state, HAND, HAND.tokens), run(state, HAND, HAND.tokens), rtol=1e-5)
    with pytest.raises(jax.experimental.checkify.JaxRuntimeError, match="tokens are not those"):
        hj.checked(run)(state, HAND, HAND.tokens + 1)
    # Token 5 is the last: what it is reaches no other query, whatever the record says.
    other = rollouts.changed(bad.tokens, (0, 5), 40)
    got, wanted = (run(state, models.Rollout(**{**vars(bad), "tokens": t}), t) for t in (other, bad.tokens))
    np.testing.assert_array_equal(got[0, :5], wanted[0, :5])
    assert jnp.isfinite(got).all()


def test_a_pass_reads_a_record_in_columns_of_its_rows_and_nothing_that_a_query_does_not_see():
    """Two sequences, of 3 and 2 tokens, and padding; from position 1 on."""
    layout = layout_of(np.array([[0, 3, 5]], np.int32), 6)
    assert layout.positions.tolist() == [[0, 1, 2, 0, 1, -1]]
    recorded = jnp.array([[[7, 7], [1, 0], [1, 3], [7, 7], [0, -1], [0, 0]]], jnp.int32)
    attend = Sparse(method=hj.Dsa(topk=2), layout=layout, recorded=recorded, start=1)
    indices = attend._replayed(recorded, None)
    # Queries before the start see no more than they select, so they select all.
    assert indices.tolist() == [[[0, -1], [1, 0], [1, -1], [0, -1], [0, -1], [-1, -1]]]
    assert attend._columns(indices).tolist() == [[[0, -1], [1, 0], [1, -1], [3, -1], [3, -1], [-1, -1]]]


def test_the_report_counts_recorded_queries_those_with_a_choice_and_made_tokens():
    r = rollouts.by_hand(start=2)  # of 6 queries the last four, the last three of which see more than 3 tokens
    is_same = np.array([[[0, 0, 1, 0, 1, 1]], [[1, 1, 0, 1, 1, 1]]], bool)
    logprobs = r.logprobs + np.array([[9, 9, 9, 9, 0.25, -0.5]], np.float32)
    out = models.TrainingOutput(
        logits=None, logprobs=logprobs, kl=None, same_selections=is_same, same_experts=is_same[:1]
    )  # fmt: skip
    report = models.replay_report(r, out)
    assert report.selections == (0.75, 0.75) and report.choices == (pytest.approx(2 / 3), 1.0)
    assert report.experts == (0.5,) and report.logprob_change == 0.5 and (report.n_queries, report.n_made) == (4, 2)
    assert report.selection_share == 0.75 and report.expert_share == 0.5
    with pytest.raises(ValueError, match="replay_report: output has no same_selections, wanted one of .*compare=True"):
        models.replay_report(r, dataclasses.replace(out, same_selections=None))
    with pytest.raises(ValueError, match=r"output is of 1 layers and tokens \[1, 6\], wanted 2 and \[1, 6\]"):
        models.replay_report(r, dataclasses.replace(out, same_selections=is_same[:1]))
