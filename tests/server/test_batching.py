"""Batching policy: what shares a run, in which order, and whose rows are whose."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.batching import assemble, plan, ready_at, split
from server.errors import InferenceFailed, SignatureMismatch
from server.ragged import Ragged
from server.tensors import InferRequest
from server.waiting import Pending, RequestQueue, shape_of, sweep
from tests.server.waiting import Answer, pending_of

PLAIN = Ragged()


def pending(rows: int = 1, width: int = 2, arrival_s: float = 0.0, timeout_s: float | None = None) -> Pending[Answer]:
    request = InferRequest({"x": np.zeros((rows, width), np.float32)}, timeout_s=timeout_s)
    return pending_of(request, arrival_s)


def queue_of(requests: Sequence[Pending[Answer]]) -> RequestQueue[Answer]:
    queue: RequestQueue[Answer] = RequestQueue()
    for request in requests:
        queue.append(request)
    return queue


def batches_of(queue: RequestQueue[Answer], now: float, max_rows: int) -> list[list[Pending[Answer]]]:
    batches = []
    while (batch := plan(queue, now, max_rows)).requests:
        batches.append(batch.requests)
    return batches


# One request: rows, width (its key), whether it was cancelled, and its timeout.
_REQUESTS = st.lists(
    st.tuples(
        st.integers(1, 6), st.integers(1, 3), st.booleans(), st.one_of(st.none(), st.sampled_from([50.0, 500.0]))
    ),
    max_size=30,
)


@given(_REQUESTS, st.integers(1, 8))
def test_plan_gives_every_live_request_to_exactly_one_batch_within_the_limits(drawn, max_rows):
    requests = [pending(rows, width, float(i), timeout) for i, (rows, width, _, timeout) in enumerate(drawn)]
    for request, (_, _, cancelled, _) in zip(requests, drawn, strict=True):
        request.future.settled = cancelled
    queue, now = queue_of(requests), 60.0
    batches, expired = [], []
    while queue.rows:
        waiting = {request.key: request for request in reversed(list(queue)) if not request.future.done()}
        oldest = min((r for r in waiting.values()), key=lambda r: r.rank_s, default=None)
        taken = plan(queue, now, max_rows)
        batches.append(taken.requests)
        expired += taken.expired
        if oldest is not None and oldest not in taken.expired:
            assert taken.requests[0] is oldest, "the first request decides which key goes next"
        assert taken.rows == sum(r.rows for r in taken.requests)
        assert len({r.key for r in taken.requests}) <= 1
        assert taken.rows <= max_rows or len(taken.requests) == 1
    run = [request for batch in batches for request in batch]
    late = [r for r in requests if r.deadline_s is not None and r.deadline_s <= now and not r.future.done()]
    alive = [r for r in requests if not r.future.done() and r not in late]
    assert sorted(map(id, run)) == sorted(map(id, alive))
    assert sorted(map(id, expired)) == sorted(map(id, late))
    for width in (1, 2, 3):
        key = pending(1, width).key
        ranked = sorted((r for r in alive if r.key == key), key=lambda r: r.rank_s)
        assert [r for r in run if r.key == key] == ranked, "order within a key is kept"
    assert queue.rows == 0
    assert list(queue) == []


@given(_REQUESTS, st.integers(1, 8))
def test_plan_fills_a_batch_until_the_next_request_does_not_fit(drawn, max_rows):
    requests = [pending(rows, 2, float(i)) for i, (rows, *_) in enumerate(drawn)]
    batches = batches_of(queue_of(requests), 0.0, max_rows)
    for batch, following in itertools.pairwise(batches):
        assert sum(r.rows for r in batch) + following[0].rows > max_rows


@given(_REQUESTS)
def test_sweep_takes_out_what_is_cancelled_or_expired_and_keeps_the_rest_in_order(drawn):
    requests = [pending(rows, width, float(i), timeout) for i, (rows, width, _, timeout) in enumerate(drawn)]
    for request, (_, _, cancelled, _) in zip(requests, drawn, strict=True):
        request.future.settled = cancelled
    queue, now = queue_of(requests), 60.0
    expired, earliest_s = sweep(queue, now)
    live = [r for r in requests if not r.future.done()]
    keep = [r for r in live if r.deadline_s is None or r.deadline_s > now]
    assert sorted(map(id, expired)) == sorted(id(r) for r in live if r not in keep)
    assert queue.rows == sum(r.rows for r in keep)
    assert earliest_s == min((r.deadline_s for r in keep if r.deadline_s is not None), default=None)
    heads = [batch[0].rank_s for batch in batches_of(queue, now, 10_000)]
    assert heads == sorted(heads)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=12), st.integers(0, 3))
def test_every_request_gets_back_exactly_its_rows(sizes, extra_axes):
    rng = np.random.default_rng(0)
    shape = (2,) * extra_axes
    inputs = [
        {"a": rng.standard_normal((n, *shape)).astype(np.float32), "b": rng.integers(0, 9, (n, 3))} for n in sizes
    ]
    requests = [pending_of(InferRequest(arrays)) for arrays in inputs]
    joined = assemble(requests, PLAIN)
    assert joined["a"].dtype == np.float32
    assert joined["b"].dtype == np.int64
    parts = split({"twice": joined["a"] * 2, "same": joined["b"]}, requests, PLAIN)
    assert len(parts) == len(sizes)
    for arrays, part in zip(inputs, parts, strict=True):
        np.testing.assert_array_equal(part["twice"], arrays["a"] * 2)
        np.testing.assert_array_equal(part["same"], arrays["b"])


def test_a_batch_of_one_is_not_copied():
    request = pending(3)
    assert assemble([request], PLAIN) is request.request.inputs
    outputs = {"y": np.zeros((3, 2))}
    assert split(outputs, [request], PLAIN)[0]["y"] is outputs["y"]


def test_parts_of_a_batch_are_views():
    outputs = {"y": np.zeros((3, 2))}
    assert all(np.shares_memory(part["y"], outputs["y"]) for part in split(outputs, [pending(1), pending(2)], PLAIN))


def test_text_tensors_are_joined_and_parted():
    texts = [np.array([b"a", b"bc"], object), np.array([b""], object)]
    requests = [pending_of(InferRequest({"text": text})) for text in texts]
    joined = assemble(requests, PLAIN)
    assert joined["text"].dtype == object
    assert [part["text"].tolist() for part in split(joined, requests, PLAIN)] == [[b"a", b"bc"], [b""]]


@pytest.mark.parametrize("shape", [(), (4, 2), (2, 3)])
@pytest.mark.parametrize("rows", [[1, 2], [3]])
def test_outputs_of_another_batch_size_are_refused(shape, rows):
    with pytest.raises(InferenceFailed, match="for a batch of 3 rows"):
        split({"good": np.zeros((3, 2)), "bad": np.zeros(shape)}, [pending(r) for r in rows], PLAIN)


def test_a_request_larger_than_the_limit_runs_alone_and_whole():
    small, large, after = pending(1), pending(9), pending(1)
    assert batches_of(queue_of([small, large, after]), 0.0, 4) == [[small], [large], [after]]


def test_names_in_any_order_share_a_batch_and_other_dtypes_do_not():
    a, b = np.zeros((1, 4), np.float32), np.zeros((1, 4), np.float32)
    keys = [
        pending_of(InferRequest(inputs)).key
        for inputs in ({"a": a, "b": b}, {"b": b, "a": a}, {"a": a.astype(np.float16), "b": b})
    ]
    assert keys[0] == keys[1] != keys[2]


def test_inputs_that_disagree_on_the_batch_size_are_refused():
    inputs = {"a": np.zeros((2, 4)), "b": np.zeros((3, 4))}
    with pytest.raises(SignatureMismatch, match=r"inputs disagree on batch size: 'a' has shape \[2, 4\], 'b'"):
        pending_of(InferRequest(inputs))


@pytest.mark.parametrize("inputs", [{"a": np.zeros(())}, {"a": np.zeros((1, 2)), "b": np.zeros(())}])
def test_a_scalar_has_no_batch_axis(inputs):
    with pytest.raises(SignatureMismatch, match="disagree on batch size"):
        pending_of(InferRequest(inputs))


def test_a_request_without_rows_is_refused():
    with pytest.raises(SignatureMismatch, match="no rows"):
        pending_of(InferRequest({"a": np.zeros((0, 4))}))


def test_a_model_that_is_not_batched_takes_any_leading_dimension_as_one_row():
    assert shape_of({"a": np.zeros((7, 4)), "b": np.zeros(())}, False, PLAIN) == (1, None, 0)


def test_a_delayed_batch_waits_until_its_oldest_request_is_old_enough():
    assert ready_at(queue_of([pending(1, arrival_s=5.0), pending(1, arrival_s=6.0)]), 4, 2.0, 0.0) == 7.0


def test_a_full_batch_does_not_wait():
    assert ready_at(queue_of([pending(1, arrival_s=5.0), pending(3, arrival_s=6.0)]), 4, 2.0, 0.0) <= 5.0


def test_a_delay_ends_early_enough_for_the_first_deadline_of_the_batch():
    waiting = [pending(1, arrival_s=5.0), pending(1, arrival_s=5.5, timeout_s=1.0)]
    assert ready_at(queue_of(waiting), 4, 2.0, 0.25) == 6.25


def test_equal_arrival_times_of_different_keys_are_taken_one_after_the_other():
    requests = [pending(1, width) for width in (1, 2, 1, 2)]
    assert batches_of(queue_of(requests), 0.0, 1) == [[requests[i]] for i in (0, 1, 2, 3)]


def test_a_slower_lane_takes_the_end_of_the_queue_and_leaves_the_order_of_the_rest():
    requests = [pending(1, arrival_s=float(i)) for i in range(6)]
    queue = queue_of(requests)
    assert plan(queue, 10.0, 2, from_end=True).requests == [requests[5], requests[4]]
    assert plan(queue, 10.0, 2).requests == [requests[0], requests[1]]
    assert queue.rows == 2
