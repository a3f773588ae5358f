"""Isolation: whatever a pass does, the run goes on with its reason."""

import os
import signal
import threading
from pathlib import Path

import numpy as np
import onnx
import pytest

from optimizers.errors import PassFailed
from optimizers.evidence import run_singly
from optimizers.host import read_host
from optimizers.isolation import Finding, Probe, Workshop, run_isolated
from optimizers.passes import PassContext, PassResult, copy_of
from server.artifact import SessionOptions
from server.providers import CPU
from server.session import Session


class Step:
    """A pass for tests; subclasses live at module level because a child process imports them."""

    version = 1
    effect = "exact"

    @property
    def name(self) -> str:
        return type(self).__name__.lower()


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


@pytest.fixture
def workshop(mlp: Path, tmp_path: Path) -> Workshop:
    rng = np.random.default_rng(0)
    singles = tuple({"x": rng.standard_normal((1, 64)).astype(np.float32)} for _ in range(4))
    probe = Probe(singles, run_singly(Session(mlp, CPU, SessionOptions()), singles))
    return Workshop(tmp_path / "work", PassContext(read_host(), work=tmp_path), probe)


def run(step: Step, mlp: Path, workshop: Workshop) -> Finding:
    before = mlp.read_bytes()
    finding = run_isolated(step, mlp, workshop, SessionOptions(config={"session.y": "2"}))
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


def test_pass_without_effect_keeps_its_input(mlp: Path, workshop: Workshop):
    finding = run(Nothing(), mlp, workshop)
    assert (finding.failure, finding.changed, finding.model) == ("", False, str(mlp))
    assert finding.note == "nothing to do"


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (Refuse(), "this model has no convolutions"),
        (Raise(), "KeyError: 'a bug in a third-party tool'"),
        (Damage(), "exact"),
        (Crash(), "killed by signal 11"),
    ],
    ids=lambda value: value.name if isinstance(value, Step) else "",
)
def test_failure_is_a_refusal_that_keeps_the_input(step: Step, reason: str, mlp: Path, workshop: Workshop):
    finding = run(step, mlp, workshop)
    assert reason in finding.failure
    assert finding.model == str(mlp)


def test_pass_that_hangs_is_stopped(mlp: Path, workshop: Workshop):
    short = Workshop(workshop.folder, workshop.context, workshop.probe, timeout_s=0.5)
    assert run(Hang(), mlp, short).failure == "stopped after 0.5 s without a result"
