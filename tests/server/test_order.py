"""Ranks: deadlines, priorities that age, and clients that get no more than their share."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.order import Order

times = st.floats(0.0, 1000.0)


@given(times, st.floats(0.0, 100.0), st.sampled_from([None, 0.5, 5.0]), st.integers(0, 9))
def test_equal_requests_keep_the_order_of_arrival(now, later, timeout_s, priority):
    order = Order()
    first, second = (
        order.rank_s(at, None if timeout_s is None else at + timeout_s, priority, "", 0.0) for at in (now, now + later)
    )
    assert first <= second


def test_what_is_due_sooner_goes_first():
    order = Order()
    patient, urgent = order.rank_s(0.0, None, 0, "", 0.0), order.rank_s(0.1, 0.2, 0, "", 0.0)
    assert urgent < patient


def test_a_higher_priority_goes_first_and_the_lower_one_ages():
    order = Order()
    low = order.rank_s(0.0, None, 9, "", 0.0)
    assert order.rank_s(3.9, None, 5, "", 0.0) < low
    assert order.rank_s(4.1, None, 5, "", 0.0) > low, "four levels are worth four seconds"
    assert order.rank_s(0.0, None, 0, "", 0.0) == order.rank_s(0.0, None, 5, "", 0.0)


def test_who_sends_more_than_its_share_queues_behind_itself():
    order = Order()
    flood = [order.rank_s(0.0, None, 0, "greedy", 0.01) for _ in range(100)]
    other = order.rank_s(0.0, None, 0, "modest", 0.01)
    assert sum(rank < other for rank in flood) == 0
    assert flood[0] == other
    assert flood[50] == pytest.approx(other + 0.5)


def test_a_client_that_waited_long_enough_owes_nothing():
    order = Order()
    for _ in range(100):
        order.rank_s(0.0, None, 0, "greedy", 0.01)
    assert order.rank_s(2.0, None, 0, "greedy", 0.01) == order.rank_s(2.0, None, 0, "modest", 0.01)


def test_the_memory_for_clients_is_bounded():
    order = Order()
    for number in range(25_000):
        order.rank_s(0.0, None, 0, f"client-{number}", 10.0)
    assert len(order._served_s) <= 10_000
    assert "client-24999" in order._served_s
