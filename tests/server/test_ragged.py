"""Requests of unequal length: padded to one shape, and cut back."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.artifact import Padding
from server.batching import assemble, plan, split
from server.errors import InferenceFailed
from server.ragged import MOST_PADDING, Ragged
from server.tensors import InferRequest
from server.waiting import Pending, RequestQueue
from tests.server.waiting import Answer, pending_of

PROOF = Padding(True, "proven", {"ids": 1, "mask": 1}, {"tokens": 1}, value=0)
RAGGED = Ragged(PROOF)


def request(length: int, rows: int = 1, start: int = 1) -> Pending[Answer]:
    ids = np.arange(start, start + rows * length, dtype=np.int64).reshape(rows, length)
    return pending_of(InferRequest({"ids": ids, "mask": np.ones_like(ids)}), ragged=RAGGED)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 3)), min_size=1, max_size=6))
def test_every_request_gets_back_its_own_positions(drawn):
    batch = [request(length, rows, 10 * number + 1) for number, (length, rows) in enumerate(drawn)]
    joined = assemble(batch, RAGGED)
    longest = max(length for length, _ in drawn)
    assert joined["ids"].shape == (sum(rows for _, rows in drawn), longest)
    assert joined["mask"].sum() == sum(length * rows for length, rows in drawn)
    assert ((joined["ids"] == 0) == (joined["mask"] == 0)).all()
    outputs = {"tokens": joined["ids"] * 2, "pooled": joined["ids"].sum(axis=1)}
    for pending, part in zip(batch, split(outputs, batch, RAGGED), strict=True):
        ids = pending.request.inputs["ids"]
        np.testing.assert_array_equal(part["tokens"], ids * 2)
        np.testing.assert_array_equal(part["pooled"], ids.sum(axis=1))


def test_lengths_share_a_key_only_where_padding_is_proven():
    assert request(3).key == request(5).key
    inputs = [InferRequest(dict(request(length).request.inputs)) for length in (3, 5)]
    for ragged in (Ragged(), Ragged(Padding(False, "a mask is missing", {"ids": 1}))):
        assert pending_of(inputs[0], ragged=ragged).key != pending_of(inputs[1], ragged=ragged).key


def test_inputs_whose_lengths_disagree_are_not_padded():
    odd = InferRequest({"ids": np.ones((1, 3), np.int64), "mask": np.ones((1, 4), np.int64)})
    assert pending_of(odd, ragged=RAGGED).length == 0


def test_an_inner_axis_is_padded_with_the_given_value():
    ragged = Ragged(Padding(True, "proven", {"x": 1}, {}, value=7))
    requests = [np.ones((1, 2, 3), np.float32), np.ones((2, 4, 3), np.float32)]
    joined = ragged.join([{"x": array} for array in requests], 3, 4)
    assert joined["x"].dtype == np.float32
    assert (joined["x"][0, 2:] == 7).all()
    assert (joined["x"][1:] == 1).all()


def test_padding_never_adds_more_than_it_may():
    queue: RequestQueue[Answer] = RequestQueue()
    for length in (4, 100, 5, 90, 6, 4):
        queue.append(request(length))
    batches = []
    while (taken := plan(queue, 0.0, 8)).requests:
        batches.append([pending.length for pending in taken.requests])
    assert batches == [[4, 5, 6, 4], [100, 90]]
    for lengths in batches:
        assert max(lengths) * len(lengths) <= MOST_PADDING * sum(lengths)


def test_where_more_wait_than_fit_those_of_like_length_go_together():
    queue: RequestQueue[Answer] = RequestQueue()
    for length in (10, 12, 14, 11, 13, 10):
        queue.append(request(length))
    assert [pending.length for pending in plan(queue, 0.0, 3).requests] == [10, 10, 11]
    assert queue.rows == 3


def test_an_output_shorter_than_its_request_is_an_error():
    with pytest.raises(InferenceFailed, match="'tokens' has 2 positions for 3"):
        RAGGED.cut({"tokens": np.zeros((1, 2))}, 3)
