"""Who is let in, who shares, who gives pages back: the bookkeeping alone, without a model. Milliseconds."""

import pathlib
import re

import numpy as np
import pytest

from hisa_jax.models import scheduler as module
from hisa_jax.models.prefixes import Sharing
from hisa_jax.models.request import Request
from hisa_jax.models.scheduler import Scheduler

SIZE = 4  # tokens of a page


def scheduler(n_pages, rows=8, max_overtakes=2, programs="AAA", **sizes):
    """`programs`: a letter each for the chunks of a prompt, its last chunk and decoding."""
    by_phase = dict(zip(("prefill", "last_prefill", "decode"), programs, strict=True))
    sizes = dict(max_length=64, prefill_rows=2, chunk=5) | sizes
    return Scheduler(
        n_pages=n_pages, page_size=SIZE, rows=rows, max_overtakes=max_overtakes, programs=by_phase, **sizes
    )  # fmt: skip


def submit(scheduler, id, n_prompt, n_new=1, first=0):
    tokens = [first or id, *range(n_prompt - 1)]
    request = Request(id=id, tokens=tokens, n_prompt=n_prompt, end=n_prompt + n_new, stop_ids=frozenset())
    scheduler.waiting[id] = request
    return request


def read(scheduler, request):
    """As the engine does: its whole prompt, the pages for it taken."""
    scheduler.extend(request, request.n_known - scheduler.pool.lengths[request.id])
    scheduler.pool.check()


def finished(scheduler, id, n_prompt, **options):
    request = submit(scheduler, id, n_prompt, **options)
    scheduler.admit()
    read(scheduler, request)
    scheduler.finish(request)
    return request


def state(scheduler):
    pool = scheduler.pool
    holders = [[pool.lengths[id], pool.pages(id)] for id in sorted(pool.lengths)]
    requests = {**scheduler.waiting, **scheduler.running, **scheduler.donors}
    contents = [(r.id, list(r.tokens), r.must_copy, r.n_overtaken) for r in requests.values()]
    return list(scheduler.waiting), list(scheduler.running), list(scheduler.donors), contents, holders, pool.n_free


def test_it_imports_neither_jax_nor_flax():
    imported = re.findall(r"^(?:import|from) (\w+)", pathlib.Path(module.__file__).read_text(), re.MULTILINE)
    assert "hisa_jax" in imported and not {"jax", "flax"} & set(imported)


def test_prompts_are_read_in_chunks_of_which_the_first_is_cut_then_made_tokens_one_by_one():
    s = scheduler(n_pages=16)
    assert s.submit([*range(12)], 2, frozenset()) == 0 and s.submit([*range(20, 23)], 1, frozenset({7})) == 1
    assert s.submit([30], 3, frozenset()) == 2
    s.admit()
    seen = []
    while batch := s.next_chunks():
        seen.append((batch.phase, [r.id for r in batch.requests], batch.starts, batch.news))
        copies, (tables, lengths, ids, n_new) = s.place(batch, 2, 5)
        assert copies == [] and ids.shape == (2, 5) and tables.shape == (2, 16) and tables.dtype == np.int32
        for row, new in enumerate(batch.news):
            assert lengths[row] == batch.starts[row] and ids[row, 5 - n_new[row] :].tolist() == new
            pages = s.pool.pages(batch.requests[row].id)
            assert tables[row].tolist() == pages + [-1] * (16 - len(pages))
    assert seen == [
        ("prefill", [0, 1], [0, 0], [[0, 1], [20, 21, 22]]),
        ("prefill", [0, 2], [2, 0], [[2, 3, 4, 5, 6], [30]]),
        ("last_prefill", [0], [7], [[7, 8, 9, 10, 11]]),
    ]
    first, second, _ = s.decoding()
    assert s.take(second, [7, 3]) is None and second.tokens == [20, 21, 22, 7]  # it stops there
    assert s.take(first, [4]) is None and [r.id for r in s.decoding()] == [0, 2]
    decode = s.batch("decode", [first], [[4, 8, 9]])  # with two proposals, of which none is right
    s.place(decode, 1, 3)
    s.truncate(first, 13)
    s.pool.check()
    assert s.pool.lengths[0] == 13 and decode.starts == [12]
    assert s.take(first, [-1]) == "logits are not finite (NaN or infinity) after 1 new tokens" and 0 not in s.running


def test_a_pass_runs_one_program_and_requests_whose_phase_has_another_wait():
    for programs, ids in (("AAA", [0, 1]), ("ABA", [0, 2]), ("AAB", [0, 1])):
        s = scheduler(n_pages=16, programs=programs)
        for n_prompt in (8, 4, 9):
            s.submit([*range(n_prompt)], 1, frozenset())
        s.admit()
        assert [request.id for request in s.next_chunks().requests] == ids, programs


def test_a_page_that_two_share_in_part_is_copied_before_one_of_them_writes():
    s = scheduler(n_pages=16)
    finished(s, 1, 6, first=9)
    second = submit(s, 2, 10, first=9)
    assert s.admit() == [(2, 1, 6)] and second.must_copy
    (had,) = s.pool.pages(1)[1:]
    copies, (tables, *_) = s.place(s.next_chunks(), 1, 5)
    assert copies == [(had, tables[0, 1])] and not second.must_copy and s.pool.pages(1)[1] == had


def test_what_a_request_had_made_before_all_pages_were_lost_is_read_as_it_was_decoded():
    s = scheduler(n_pages=16, programs="ABC")
    s.submit([*range(4)], 9, frozenset())
    s.admit()
    (request,) = s.running.values()
    s.place(s.next_chunks(), 1, 5)
    for token in (50, 51, 52):
        s.take(request, [token])
        s.place(s.batch("decode", [request], [[token]]), 1, 1)
    s.take(request, [53])
    s.start_over()
    s.admit()
    phases = []
    while batch := s.next_chunks():
        phases.append((batch.phase, batch.news))
        s.place(batch, 1, 5)
    assert phases == [("last_prefill", [[0, 1, 2, 3]]), ("decode", [[50, 51, 52]])] and s.decoding() == [request]


def test_what_can_never_be_served_is_refused_and_takes_no_number():
    s = scheduler(n_pages=5, max_length=40)
    for tokens, n_new, message in ((38, 3, "41 tokens in 12 pages"), (17, 1, "18 tokens in 6 pages")):
        with pytest.raises(ValueError, match=f"submit: .* make {message}, wanted at most max_length=40 in 5"):
            s.submit([0] * tokens, n_new, frozenset())
    assert not s.waiting and s.submit([0] * 15, 1, frozenset()) == 0


def test_small_requests_pass_one_that_waits_for_pages_so_often_and_no_more():
    s = scheduler(n_pages=10, max_overtakes=2)
    runs = submit(s, 0, 11)
    s.admit()
    read(s, runs)
    for id, n_prompt in ((1, 31), (2, 3), (3, 3), (4, 3), (5, 3)):
        submit(s, id, n_prompt)
    s.admit()
    assert list(s.running) == [0, 2, 3] and list(s.waiting) == [1, 4, 5]
    for id in (2, 3):  # there is room again, but it has been passed twice
        s.drop(id)
        s.admit()
        assert list(s.waiting) == [1, 4, 5]
    s.drop(0)
    s.admit()
    assert list(s.running) == [1, 4, 5] and s.waiting == {}


def test_without_overtaking_requests_are_let_in_as_they_came():
    s = scheduler(n_pages=10, max_overtakes=0)
    for id, n_prompt in enumerate((23, 31, 3)):
        submit(s, id, n_prompt)
    s.admit()
    assert list(s.running) == [0] and list(s.waiting) == [1, 2]


def test_looking_at_one_that_does_not_fit_drops_no_donor_and_letting_one_in_drops_the_oldest_that_is_needed():
    s = scheduler(n_pages=12)
    for id in range(3):
        finished(s, id, 7)
    runs = submit(s, 3, 15)
    s.admit()
    read(s, runs)
    before = state(s)
    for id in (4, 5, 6):
        submit(s, id, 39)
    assert s.admit() == [] and list(s.waiting) == [4, 5, 6] and list(s.donors) == [0, 1, 2]
    for id in (4, 5, 6):
        s.drop(id)
    assert state(s) == before
    submit(s, 7, 15)  # 4 pages: 2 are free, donor 0 gives 2
    s.admit()
    assert list(s.donors) == [1, 2] and 7 in s.running


def test_a_donor_whose_pages_others_hold_is_not_dropped_where_it_would_free_nothing():
    s = scheduler(n_pages=8)
    finished(s, 0, 8, first=9)
    runs = submit(s, 1, 9, n_new=3, first=9)  # shares both pages of 0
    assert s.admit() == [(1, 0, 8)]
    read(s, runs)
    finished(s, 2, 7)
    submit(s, 3, 15)
    s.admit()
    assert 3 in s.running and list(s.donors) == [0]


@pytest.mark.parametrize(
    ("sharing", "n_prompt", "donor", "limit"),
    [
        (Sharing(prompt_only=False, tail=0), 20, 12, 19),
        (Sharing(prompt_only=True, tail=0), 20, 12, 12),
        (Sharing(prompt_only=True, tail=0), 12, 20, 11),
        (Sharing(prompt_only=True, tail=5), 20, 12, 7),
        (Sharing(prompt_only=True, tail=5), 12, 20, 7),
        (Sharing(prompt_only=True, tail=5), 4, 20, -1),
    ],
)
def test_what_may_be_shared_ends_where_phases_differ(sharing, n_prompt, donor, limit):
    assert sharing.limit(n_prompt, donor) == limit


@pytest.mark.parametrize(
    ("programs", "sharing"),
    [
        ("AAA", Sharing(prompt_only=False, tail=0)),
        ("AAB", Sharing(prompt_only=True, tail=0)),
        ("ABA", Sharing(prompt_only=True, tail=5)),
        ("ABB", Sharing(prompt_only=True, tail=5)),
        ("ABC", Sharing(prompt_only=True, tail=5)),
    ],
)
def test_what_is_shared_was_cached_by_the_same_program(programs, sharing):
    assert Sharing.of(*programs, chunk=5) == sharing


def test_one_whose_page_was_copied_or_given_back_in_an_undone_step_reads_anew():
    """The page that two share in part becomes the other's own, which has fewer tokens before what it writes."""
    s = scheduler(n_pages=14)
    first, third = submit(s, 1, 12), submit(s, 3, 5)
    s.admit()
    s.extend(first, 7)
    s.extend(third, 5)
    second = submit(s, 2, 9, first=1)
    second.tokens[5:] = [9] * 4
    saved = s.save()
    s.admit()
    assert s.pool.lengths[2] == 5 and len(s.extend(first, 5)) == 1 and s.extend(second, 4) == []
    s.drop(3)
    s.restore(saved, are_pages_written=True)
    s.pool.check()
    assert list(s.waiting) == [1, 3, 2] and s.running == {} and s.pool.n_free == 14


def test_what_was_undone_is_as_it_was_but_for_donors_whose_pages_may_be_overwritten():
    """Random traffic; each step is done on a saved state, undone, compared, and done for good."""
    rng, s, next_id, n_undone, n_lost = np.random.default_rng(0), scheduler(n_pages=14, rows=3), 0, 0, 0
    for _ in range(300):
        if rng.random() < 0.6:
            submit(s, next_id, int(rng.integers(1, 30)), int(rng.integers(1, 8)), first=int(rng.integers(1, 4)))
            next_id += 1

        def step(rng):
            s.admit()
            for request in list(s.running.values()):
                left = request.n_known - s.pool.lengths[request.id]
                s.extend(request, max(1, min(6, left)) if left else 1)
                if s.pool.lengths[request.id] >= request.n_prompt:
                    request.tokens.append(1)
                if request.is_finished:
                    s.finish(request)
                elif rng.random() < 0.05:
                    s.drop(request.id)

        before, saved, are_pages_written, seed = state(s), s.save(), rng.random() < 0.5, rng.integers(2**31)
        step(np.random.default_rng(seed))
        had = {id: saved.pool.pages(id) for id in saved.pool.lengths}
        lost = [id for id in had if id not in s.pool.lengths or s.pool.pages(id)[: len(had[id])] != had[id]]
        lost = lost if are_pages_written else []
        s.restore(saved, are_pages_written=are_pages_written)
        s.pool.check()
        assert list(s.donors) == [id for id in before[2] if id not in lost]
        again = [id for id in before[1] if id in lost]
        assert list(s.running) == [id for id in before[1] if id not in again]
        assert list(s.waiting) == again + before[0]
        if not lost:
            assert state(s) == before
            n_undone += 1
        else:
            n_lost += 1
        step(np.random.default_rng(seed))
        s.pool.check()
    assert n_undone > 100 and n_lost > 20
    s.start_over()
    assert not s.running and not s.donors and s.pool.n_free == s.pool.n_pages


def groups(n_pages, n_groups=2, n_devices=1, stripe=SIZE, **sizes):
    return scheduler(n_pages, n_groups=n_groups, n_devices=n_devices, stripe=stripe, **sizes)


def test_requests_go_to_the_group_that_has_their_prefix_else_to_the_one_with_fewest():
    s = groups(40, rows=4, prefill_rows=2)
    finished(s, 1, 9)
    for id, first in ((2, 1), (5, 1), (3, 3), (4, 4)):
        submit(s, id, 9, first=first)
    assert s.admit() == [(2, 1, 8), (5, 1, 8)]  # whose prefix is in group 0, where no row is left then
    assert [s.pool.group(id) for id in (2, 5, 3, 4)] == [0, 0, 1, 1]
    submit(s, 6, 9, first=1)
    assert s.admit() == [] and 6 in s.waiting  # no row anywhere
    batch = s.next_chunks()
    assert [r.id for r in batch.requests] == [2, 3] and s.rows_of(batch.requests, 2) == [0, 1]
    running = list(s.running.values())
    assert dict(zip([r.id for r in running], s.rows_of(running, 4), strict=True)) == {2: 0, 3: 2, 4: 3, 5: 1}
    copies, (tables, *_) = s.place(batch, 2, 5)
    s.pool.check()
    assert not copies and (tables < 20).all() and (tables[:, :2] >= 0).any()
    for row, request in enumerate(batch.requests):  # counted from the first page of the group
        pages = s.pool.pages(request.id)
        assert [page - 20 * row for page in pages] == tables[row, : len(pages)].tolist()
    pairs = s.copies_of_groups([(22, 25), (3, 4), (30, 31)], 8)
    assert pairs.T.tolist() == [[3, 4], *[[-1, -1]] * 3, [2, 5], [10, 11], *[[-1, -1]] * 2]


def test_a_device_without_pages_lets_requests_wait_though_others_have_some():
    """Four devices of 3 pages: a request's first page lies on the first one, whatever its length."""
    s = groups(12, n_groups=1, n_devices=4)
    for id in range(1, 5):
        submit(s, id, 3)
    submit(s, 5, 2 * SIZE, n_new=2 * SIZE, first=50)
    s.admit()
    for request in s.running.values():
        read(s, request)
    assert [*s.running] == [1, 2, 3] and s.pool.n_free_on(0) == [0, 3, 3, 3]
    assert s.drop(2) and s.pool.n_free_on(0) == [1, 3, 3, 3]
    s.finish(s.running[1])  # kept for others, but given up for whom it suffices
    s.admit()
    assert [*s.running] == [3, 4, 5] and not s.donors
    for request in list(s.running.values()):
        read(s, request)
        s.drop(request.id)
    s.release()
    assert s.pool.n_free_on(0) == [3, 3, 3, 3]
    with pytest.raises(ValueError, match=r"make 33 tokens in 4 pages of a device, wanted at most max_length=64 in 3"):
        s.submit([0] * 32, 1, frozenset())
    assert s.submit([0] * 31, 1, frozenset()) == 0


def test_requests_come_and_go_at_random_and_no_device_is_over_committed():
    rng = np.random.default_rng(0)
    s, ids = groups(36, n_groups=2, n_devices=3, stripe=2 * SIZE, rows=6), iter(range(10_000))
    for _ in range(1500):
        act = rng.integers(5)
        if act == 0 and len(s.waiting) < 4:
            submit(s, next(ids), int(rng.integers(1, 30)), n_new=int(rng.integers(1, 8)), first=int(rng.integers(1, 4)))
        elif act == 1:
            s.admit()
        elif s.running:
            request = list(s.running.values())[rng.integers(len(s.running))]
            length = s.pool.lengths[request.id]
            if act == 2 and rng.random() < 0.2:
                s.drop(request.id)
            elif length < request.end:
                s.extend(request, int(rng.integers(1, request.end - length + 1)))  # never out of pages
            else:
                s.finish(request)
        s.pool.check()
        assert max([0, *(s.rows_of(list(s.running.values()), 6))]) < 6
    assert next(ids) > 200
    for id in list(s.running):
        s.drop(id)
    s.release()
    assert s.pool.n_free == 36
