"""Cores shared by several models: never more than there are, and each model its part."""

from server.sharing import Cores, Member


class Load:
    """A model with endless work of one thread per batch."""

    def __init__(self, cores: Cores, seconds: float) -> None:
        self.seconds, self.batches, self.running = seconds, 0, 0
        self.member: Member = cores.join(self.dispatch)
        self.member.set_waits(True)

    def dispatch(self) -> None:
        while self.member.has_room("cpu", 1):
            self.member.take("cpu", 1)
            self.running += 1

    def finish(self) -> None:
        self.running -= 1
        self.batches += 1
        self.member.give("cpu", 1, self.seconds)
        self.member.dispatch_all()


def test_batches_never_exceed_the_cores_and_a_wide_one_runs_alone():
    cores = Cores(2)
    first, second = cores.join(lambda: None), cores.join(lambda: None)
    first.take("cpu", 1)
    assert second.has_room("cpu", 1)
    assert not second.has_room("cpu", 2)
    assert second.has_room("cuda:0", 4), "an idle device takes any batch"
    first.give("cpu", 1, 1.0)
    assert second.has_room("cpu", 4)


def test_models_get_equal_time_though_their_batches_differ():
    cores = Cores(1)
    short, long = Load(cores, 1.0), Load(cores, 4.0)
    short.dispatch()
    for _ in range(500):
        (short if short.running else long).finish()
    assert 0.9 < short.batches * 1.0 / (long.batches * 4.0) < 1.1


def test_a_model_that_was_idle_has_saved_nothing_up():
    cores = Cores(1)
    busy, idle = Load(cores, 1.0), Load(cores, 1.0)
    idle.member.set_waits(False)
    busy.dispatch()
    for _ in range(100):
        busy.finish()
    idle.member.set_waits(True)
    before = busy.batches
    for _ in range(20):
        (busy if busy.running else idle).finish()
    assert busy.batches - before >= 9


def test_others_that_wait_halve_what_a_model_may_count_on():
    cores = Cores(4)
    first, second = cores.join(lambda: None), cores.join(lambda: None)
    assert first.share == 4
    second.set_waits(True)
    assert first.share == 2
    assert second.share == 4
    cores.leave(second)
    assert first.share == 4
