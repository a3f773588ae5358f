"""When a lane gets no work, and when it is tried again."""

from server.breaker import Breaker


def test_a_failed_probe_opens_and_the_pause_doubles():
    breaker = Breaker()
    breaker.failed(10.0, False)
    assert breaker.open
    assert breaker.retry_at_s == 10.1
    breaker.failed(11.0, False)
    assert breaker.retry_at_s == 11.2
    for _ in range(20):
        breaker.failed(20.0, False)
    assert breaker.retry_at_s == 50.0


def test_a_passed_probe_blames_the_input_however_often():
    breaker = Breaker()
    for _ in range(100):
        breaker.failed(0.0, True)
    assert not breaker.open


def test_success_closes_and_forgets():
    breaker = Breaker()
    breaker.failed(0.0, False)
    breaker.passed()
    assert not breaker.open
    breaker.failed(5.0, False)
    assert breaker.retry_at_s == 5.1


def test_without_a_probe_only_many_failures_in_a_row_open():
    breaker = Breaker()
    for _ in range(7):
        breaker.failed(0.0, None)
    assert not breaker.open
    breaker.passed()
    for _ in range(8):
        assert not breaker.open
        breaker.failed(0.0, None)
    assert breaker.open


def test_the_next_failure_of_a_half_open_lane_opens_it_again():
    breaker = Breaker()
    breaker.failed(0.0, False)
    breaker.half_open()
    assert not breaker.open
    breaker.failed(1.0, None)
    assert breaker.open
