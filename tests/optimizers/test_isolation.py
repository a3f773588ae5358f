"""Isolation: whatever a pass does, the run goes on with its reason."""

import atexit
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from msgspec.structs import replace

from optimizers.budget import Budget
from optimizers.errors import PassFailed
from optimizers.evidence import run_singly
from optimizers.isolation import Finding, Form, Probe, Workshop, nursery_of_passes, run_isolated
from optimizers.nursery import Nursery
from optimizers.passes import Effect, PassContext, PassResult, PassSpec, copy_of
from optimizers.store import Store
from server.artifact import SessionOptions, digest_of
from server.host import read_host
from server.providers import CPU
from server.session import Session


class Step:
    """A pass for tests; subclasses live at module level because a child process imports them."""

    effect: Effect = "exact"

    @property
    def spec(self) -> PassSpec:
        return PassSpec(type(self).__name__.lower(), 1, self.effect)


class Nothing(Step):
    def run(self, model: onnx.ModelProto, context: PassContext) -> PassResult:
        return PassResult(model, changed=False, note="nothing to do")


class Rename(Step):
    def run(self, model: onnx.ModelProto, context: PassContext) -> PassResult:
        twin = copy_of(model)
        twin.producer_name = "rename"
        return PassResult(twin, changed=True, counts={"names": 1}, options=SessionOptions(config={"session.x": "1"}))


class Damage(Step):
    """Silently changes a weight."""

    def run(self, model: onnx.ModelProto, context: PassContext) -> PassResult:
        twin = copy_of(model)
        tensor = twin.graph.initializer[0]
        tensor.raw_data = (onnx.numpy_helper.to_array(tensor) * np.float32(1.1)).tobytes()
        return PassResult(twin, changed=True)


class Refuse(Step):
    def run(self, model: onnx.ModelProto, context: PassContext) -> PassResult:
        raise PassFailed("this model has no convolutions")


class Raise(Step):
    def run(self, model: onnx.ModelProto, context: PassContext) -> PassResult:
        raise KeyError("a bug in a third-party tool")


class Crash(Step):
    def run(self, model: onnx.ModelProto, context: PassContext) -> PassResult:
        os.kill(os.getpid(), signal.SIGSEGV)
        raise AssertionError


class Hang(Step):
    def run(self, model: onnx.ModelProto, context: PassContext) -> PassResult:
        threading.Event().wait()
        raise AssertionError


class Gated(msgspec.Struct, frozen=True):
    """Waits until a file is there."""

    gate: str = ""

    @property
    def spec(self) -> PassSpec:
        return PassSpec("gated", 1, "exact")

    def run(self, model: onnx.ModelProto, context: PassContext) -> PassResult:
        while not Path(self.gate).exists():
            threading.Event().wait(0.01)
        return PassResult(model, changed=False)


class Exit(Step):
    def run(self, model: onnx.ModelProto, context: PassContext) -> PassResult:
        print("the native library gives up", flush=True)  # noqa: T201
        os._exit(3)


class QuietExit(Step):
    """Ends its process as if all were well, without an answer."""

    def run(self, model: onnx.ModelProto, context: PassContext) -> PassResult:
        sys.exit(0)


class CrashAtTheEnd(Step):
    """Delivers its result, then its process fails on the way out."""

    def run(self, model: onnx.ModelProto, context: PassContext) -> PassResult:
        atexit.register(os._exit, 4)
        return PassResult(model, changed=False)


class NewSignature(Step):
    def run(self, model: onnx.ModelProto, context: PassContext) -> PassResult:
        twin = copy_of(model)
        twin.graph.output[0].name = twin.graph.node[-1].output[0] = "logits"
        return PassResult(twin, changed=True)


class Mutilate(Step):
    """Leaves a graph whose first node takes what nobody makes."""

    def run(self, model: onnx.ModelProto, context: PassContext) -> PassResult:
        twin = copy_of(model)
        twin.graph.node[0].input[0] = "nowhere"
        return PassResult(twin, changed=True)


class Garbage(Step):
    """A lossy pass whose result is finite and has nothing to do with the model."""

    effect = "lossy"

    def run(self, model: onnx.ModelProto, context: PassContext) -> PassResult:
        twin = copy_of(model)
        rng = np.random.default_rng(7)
        for tensor in twin.graph.initializer:
            tensor.raw_data = rng.standard_normal(list(tensor.dims)).astype(np.float32).tobytes()
        return PassResult(twin, changed=True)


class Coarse(Step):
    """A lossy pass as it should be: weights rounded to few steps."""

    effect = "lossy"
    steps = 64

    def run(self, model: onnx.ModelProto, context: PassContext) -> PassResult:
        twin = copy_of(model)
        for tensor in twin.graph.initializer:
            rounded = np.round(onnx.numpy_helper.to_array(tensor) * self.steps) / self.steps
            tensor.raw_data = rounded.astype(np.float32).tobytes()
        return PassResult(twin, changed=True)


class Coarser(Coarse):
    """Rounds so much that some decisions change."""

    steps = 16


class Hoard(Step):
    """Takes memory until somebody stops it."""

    def run(self, model: onnx.ModelProto, context: PassContext) -> PassResult:
        held = []
        while True:
            held.append(np.ones(4_000_000))
            threading.Event().wait(0.001)


class Calibrated(Rename):
    """Needs real inputs and the facts of the host."""

    @property
    def spec(self) -> PassSpec:
        return PassSpec("calibrated", 1, "exact", needs=frozenset({"calibration", "host"}))


class NotANumber(Step):
    effect = "lossy"

    def run(self, model: onnx.ModelProto, context: PassContext) -> PassResult:
        twin = copy_of(model)
        tensor = twin.graph.initializer[0]
        tensor.raw_data = np.full(list(tensor.dims), np.nan, np.float32).tobytes()
        return PassResult(twin, changed=True)


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    """One for all tests of this module: whatever a job does, the next one must find it whole."""
    with closing(nursery_of_passes()) as made:
        yield made


@pytest.fixture
def workshop(mlp: Path, tmp_path: Path, nursery: Nursery) -> Workshop:
    rng = np.random.default_rng(0)
    singles = tuple({"x": rng.standard_normal((1, 64)).astype(np.float32)} for _ in range(4))
    probe = Probe(singles, run_singly(Session(mlp, CPU, SessionOptions()), singles))
    return Workshop(Store(tmp_path / "store"), nursery, PassContext(read_host(), work=tmp_path), probe, "inputs")


def form_of(model: Path) -> Form:
    return Form(model, digest_of(model), SessionOptions(config={"session.y": "2"}))


def run(step: Step, mlp: Path, workshop: Workshop) -> Finding:
    before = mlp.read_bytes()
    finding = run_isolated(step, form_of(mlp), workshop)
    assert mlp.read_bytes() == before
    return finding


def test_result_is_a_new_file_with_its_account(mlp: Path, workshop: Workshop):
    finding = run(Rename(), mlp, workshop)
    assert (finding.failure, finding.changed, finding.counts) == ("", True, {"names": 1})
    assert onnx.load(finding.model).producer_name == "rename"
    assert finding.options.config == {"session.x": "1", "session.y": "2"}
    assert finding.sqnr_db == 200
    assert finding.ops_before == finding.ops_after == {"MatMul": 2, "Add": 1, "Relu": 1}
    assert finding.seconds > 0
    assert finding.sha256 == digest_of(Path(finding.model))
    assert not finding.cached


def test_pass_without_effect_keeps_its_input(mlp: Path, workshop: Workshop):
    finding = run(Nothing(), mlp, workshop)
    assert (finding.failure, finding.changed, finding.model, finding.sha256) == ("", False, "", "")
    assert finding.note == "nothing to do"


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (Refuse(), "this model has no convolutions"),
        (Raise(), "KeyError: 'a bug in a third-party tool'"),
        (Damage(), "exact"),
        (Crash(), "its process was killed by signal 11"),
        (Exit(), "its process ended with status 3: the native library gives up"),
        (QuietExit(), "its process ended with status 0"),
        (CrashAtTheEnd(), "its process ended with status 4"),
        (NewSignature(), "inputs and outputs are ['x', 'logits'], were ['x', 'y']"),
        (Mutilate(), "the result is not usable:"),
        (Garbage(), "dB to the original, lossy needs 0 dB"),
        (NotANumber(), "is NaN or infinite where it was finite"),
    ],
    ids=lambda value: value.spec.name if isinstance(value, Step) else "",
)
def test_failure_is_a_refusal_that_keeps_the_input(step: Step, reason: str, mlp: Path, workshop: Workshop):
    finding = run(step, mlp, workshop)
    assert reason in finding.failure
    assert (finding.model, finding.sha256) == ("", "")


def test_lossy_result_near_the_original_is_taken_with_its_distance(mlp: Path, workshop: Workshop):
    finding = run(Coarse(), mlp, workshop)
    assert (finding.failure, finding.changed) == ("", True)
    assert finding.sqnr_db is not None
    assert 20 < finding.sqnr_db < 60


def test_pass_that_hangs_is_stopped(mlp: Path, workshop: Workshop):
    short = replace(workshop, timeout_s=0.5)
    assert run(Hang(), mlp, short).failure == "stopped after 0.5 s without a result"


def test_pass_that_eats_memory_is_stopped(mlp: Path, workshop: Workshop):
    finding = run(Hoard(), mlp, replace(workshop, memory_bytes=700_000_000))
    assert re.fullmatch(r"stopped at 0\.[7-9] GB of memory; allowed are 0\.7 GB", finding.failure)


def within(workshop: Workshop, left_s: float) -> Workshop:
    budget = Budget(left_s)
    budget.begin()
    return replace(workshop, budget=budget)


def test_pass_is_stopped_when_the_time_budget_is_spent_and_may_go_well_next_time(mlp: Path, workshop: Workshop):
    finding = run(Gated(str(workshop.context.work / "gate")), mlp, within(workshop, 0.5))
    assert re.fullmatch(r"stopped after [01] s: the time budget is spent", finding.failure)
    (workshop.context.work / "gate").touch()
    again = run(Gated(str(workshop.context.work / "gate")), mlp, workshop)
    assert (again.failure, again.cached) == ("", False)


def test_time_limit_of_a_pass_holds_within_the_time_budget(mlp: Path, workshop: Workshop):
    short = replace(within(workshop, 600.0), timeout_s=0.5)
    assert run(Hang(), mlp, short).failure == "stopped after 0.5 s without a result"


def test_pass_that_took_longer_than_what_is_left_does_not_start(mlp: Path, workshop: Workshop):
    run(Rename(), mlp, workshop)
    other = replace(form_of(mlp), sha256="other")
    (place,) = workshop.store.folder.glob("*/*/seconds.json")
    place.write_text("42.5")
    finding = run_isolated(Rename(), other, within(workshop, 40.0))
    assert finding.failure == "would not finish within the time budget (needs about 43 s)"
    assert finding.seconds == 0.0
    assert run_isolated(Rename(), other, within(workshop, 44.0)).failure == ""
    assert run_isolated(Nothing(), other, within(workshop, 40.0)).failure == "", "nothing is known of another pass"


def test_what_is_in_the_store_needs_no_time(mlp: Path, workshop: Workshop):
    run(Rename(), mlp, workshop)
    assert run(Rename(), mlp, within(workshop, 0.0)).cached
    assert run(Nothing(), mlp, within(workshop, 0.0)).failure == "the time budget is spent"


def test_same_job_is_answered_from_the_store(mlp: Path, workshop: Workshop):
    first = run(Rename(), mlp, workshop)
    again = run(Rename(), mlp, workshop)
    assert again == replace(first, cached=True)
    assert Path(again.model).is_file()


def test_refusal_of_a_pass_is_kept_but_not_the_end_of_its_process(mlp: Path, workshop: Workshop):
    for step, kept in ((Refuse(), True), (Crash(), False)):
        assert [run(step, mlp, workshop).cached for _ in range(2)] == [False, kept]


@pytest.mark.parametrize("change", ["model", "options", "inputs", "tools", "seed"])
def test_another_job_is_not_answered_from_the_store(change: str, mlp: Path, workshop: Workshop):
    run(Rename(), mlp, workshop)
    form, shop = form_of(mlp), workshop
    if change == "model":
        form = replace(form, sha256="other")
    elif change == "options":
        form = replace(form, options=SessionOptions())
    elif change == "inputs":
        shop = replace(workshop, inputs="other")
    else:
        host = replace(workshop.context.host, tools={"onnx": "0"})
        changed = {"tools": {"host": host}, "seed": {"seed": 1}}[change]
        shop = replace(workshop, context=replace(workshop.context, **changed))
    assert not run_isolated(Rename(), form, shop).cached


def test_result_for_another_host_counts_only_if_the_pass_does_not_look_at_the_host(mlp: Path, workshop: Workshop):
    elsewhere = replace(workshop, context=replace(workshop.context, host=replace(workshop.context.host, cpu="other")))
    for step, counts in ((Rename(), True), (Calibrated(), False)):
        run(step, mlp, workshop)
        assert run(step, mlp, elsewhere).cached is counts
