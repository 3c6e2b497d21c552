"""Promises of the batches to train on and of the samples to measure with."""

import dataclasses
import threading

import numpy as np
import pytest

from hisa_jax.models.training import batches as module
from hisa_jax.models.training.batches import Batches, held_out_samples, held_out_windows, prefetched
from hisa_jax.models.training.tasks import KINDS
from hisa_jax.models.training.text import read_corpus
from tests.models.training.folders import many_files, write_files
from tests.models.training.reader import Reader


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return read_corpus([write_files(tmp_path_factory.mktemp("root"), many_files())])


def make(corpus, **changes):
    return Batches(corpus, **{"length": 512, "batch": 4, "synthetic_share": 0.5, "seed": 1, **changes})


def assert_equal(batch, other):
    np.testing.assert_array_equal(batch.tokens, other.tokens)
    np.testing.assert_array_equal(batch.is_answer, other.is_answer)


def test_a_step_gives_the_same_batch_whatever_came_before(corpus):
    batches = make(corpus)
    first = [batches(step) for step in range(4)]
    for step in (3, 1, 2, 0):
        assert_equal(make(corpus)(step), first[step])
    assert len({batch.tokens.tobytes() for batch in first}) == 4
    assert make(corpus, seed=2)(0).tokens.tobytes() != first[0].tokens.tobytes()


def test_a_batch_has_one_byte_more_than_inputs(corpus):
    batch = make(corpus, length=300, batch=3)(0)
    assert batch.tokens.shape == batch.is_answer.shape == (3, 301)
    assert (batch.tokens.dtype, batch.is_answer.dtype) == (np.uint8, bool)


@pytest.mark.parametrize(("share", "fewest", "most"), [(0.0, 0, 0), (0.5, 2, 2), (0.3, 1, 2), (1.0, 4, 4)])
def test_the_share_of_sequences_with_questions_is_kept(corpus, share, fewest, most):
    counts = [int(make(corpus, synthetic_share=share)(step).is_answer.any(axis=1).sum()) for step in range(200)]
    assert (min(counts), max(counts)) == (fewest, most)
    assert np.mean(counts) == pytest.approx(4 * share, abs=0.15)


def test_sequences_are_windows_of_the_text_to_train_on(corpus):
    train = corpus.train.tobytes()
    for step in range(5):
        batch = make(corpus, synthetic_share=0.5)(step)
        for tokens, is_answer in zip(batch.tokens, batch.is_answer, strict=True):
            text = tokens.tobytes()
            if not is_answer.any():
                assert text in train
                continue
            assert sum(len(answer) for _, answer in Reader(text).questions) == is_answer.sum()
            prose = [part for part in text.split(b"\n") if part and not part.startswith(b"<<")]
            assert all(part.strip(b"\0") in train for part in prose)


def test_windows_come_from_all_over_the_text():
    text = np.arange(1000)
    starts = [module.window(np.random.default_rng(seed), text, 900)[0] for seed in range(1000)]
    assert (min(starts), max(starts)) == (0, 100)  # both ends included
    assert np.mean(starts) == pytest.approx(50, abs=5)


@pytest.mark.parametrize("workers", [1, 3])
def test_batches_made_ahead_are_the_same_in_order(corpus, workers):
    batches = make(corpus)
    made = list(prefetched(batches, 5, 12, workers))
    assert len(made) == 12
    for step, batch in enumerate(made, start=5):
        assert_equal(batch, batches(step))


def test_who_stops_early_waits_for_nothing_and_leaves_no_thread_at_work():
    before, gate, begun = threading.active_count(), threading.Event(), []

    def slow(step):
        begun.append(step)
        assert step == 0 or gate.wait(60)
        return step

    ahead = prefetched(slow, 0, 10**9, workers=1)
    assert next(ahead) == 0
    ahead.close()  # while step 1 is in the making or about to be
    gate.set()
    for thread in threading.enumerate():
        if thread.name.startswith("ThreadPoolExecutor"):
            thread.join(timeout=60)
    assert threading.active_count() <= before
    assert begun in ([0], [0, 1])


def test_an_error_in_a_worker_reaches_the_reader(corpus, monkeypatch):
    def fails(*_):
        raise RuntimeError("from the worker")

    monkeypatch.setattr(module, "dense_mix", fails)
    with pytest.raises(RuntimeError, match="from the worker"):
        list(prefetched(make(corpus), 0, 3, 2))


@pytest.mark.parametrize("kind", KINDS)
def test_samples_to_measure_with_are_drawn_from_the_text_held_out(corpus, kind):
    samples = held_out_samples(corpus, kind, 2048, 4, seed=3)
    assert [sample.tokens.size for sample in samples] == [2048] * 4
    held_out, train = corpus.held_out.tobytes(), corpus.train.tobytes()
    for sample in samples:
        text = sample.tokens.tobytes()
        Reader(text)
        prose = [part.strip(b"\0") for part in text.split(b"\n") if len(part) > 20 and not part.startswith(b"<<")]
        assert prose
        assert all(part in held_out and part not in train for part in prose)


def test_samples_to_measure_with_hang_on_their_seed_and_number_alone(corpus):
    few, many = (held_out_samples(corpus, "needle", 1024, n, seed=3, depth=0.5) for n in (2, 5))
    for sample, same in zip(few, many, strict=False):
        np.testing.assert_array_equal(sample.tokens, same.tokens)
    assert len({sample.tokens.tobytes() for sample in many}) == 5
    assert held_out_samples(corpus, "needle", 1024, 1, seed=4)[0].tokens.tobytes() != few[0].tokens.tobytes()


def test_windows_held_out_reach_from_the_first_byte_to_the_last(corpus):
    windows = held_out_windows(corpus, 1000, 5)
    assert windows.shape == (5, 1000)
    np.testing.assert_array_equal(windows[0], corpus.held_out[:1000])
    np.testing.assert_array_equal(windows[-1], corpus.held_out[-1000:])
    with pytest.raises(ValueError, match="held_out_windows: length is 100000000, wanted 1 to"):
        held_out_windows(corpus, 100_000_000, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": 0}, r"Batches\(length=0\): wanted 1 to"),
        ({"length": 10**9}, r"Batches\(length=1000000000\): wanted 1 to"),
        ({"length": 100}, r"Batches\(length=100\): wanted at least 127 for sequences with questions"),
        ({"batch": 0}, r"Batches\(batch=0\): wanted at least 1"),
        ({"synthetic_share": 1.5}, r"Batches\(synthetic_share=1.5\): wanted 0 to 1"),
    ],
)
def test_batches_that_cannot_be_made_are_refused_by_name(corpus, changes, message):
    with pytest.raises(ValueError, match=message):
        make(corpus, **changes)


def test_the_shortest_sequences_hold_a_question(corpus):
    batch = make(corpus, length=127, synthetic_share=1.0)(0)
    assert batch.is_answer.any(axis=1).all()


def test_samples_that_cannot_be_made_are_refused_by_name(corpus):
    with pytest.raises(ValueError, match="kind is 'noodle', wanted one of needle, multikey"):
        held_out_samples(corpus, "noodle", 1024, 1, seed=0)
    with pytest.raises(ValueError, match="context is 100000000, wanted 1 to"):
        held_out_samples(corpus, "needle", 100_000_000, 1, seed=0)
    with pytest.raises(ValueError, match="workers is 0, wanted at least 1"):
        next(prefetched(make(corpus), 0, 1, 0))


def test_a_corpus_with_other_text_gives_other_batches(corpus):
    other = dataclasses.replace(corpus, train=corpus.train[::-1].copy())
    assert make(other)(0).tokens.tobytes() != make(corpus)(0).tokens.tobytes()
