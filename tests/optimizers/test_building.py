"""Lines of passes: what is shared, where a chain ends, what the records say. Also the bench of the search's tests."""

from collections.abc import Iterator
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from optimizers import isolation
from optimizers.building import Built, Line, on_gpu
from optimizers.calibration import Samples
from optimizers.evidence import HeldOut, run_singly
from optimizers.exam import Exam
from optimizers.fidelity import decision_for
from optimizers.isolation import SERVING, Form, Probe, Workshop, nursery_of_passes
from optimizers.measurement import Comparison
from optimizers.nursery import Nursery
from optimizers.passes import Effect, PassContext, PassResult, PassSpec, copy_of
from optimizers.racing import Track
from optimizers.records import Speed
from optimizers.store import Store
from server.artifact import digest_of
from server.host import read_host
from server.providers import CPU
from server.session import Session
from server.tensors import Tensors
from tests.optimizers.graphs import weights_of
from tests.optimizers.test_isolation import Crash, Nothing, Refuse, Rename

_BURDEN = "burden"


class Burden(msgspec.Struct, frozen=True):
    """Make a model much slower and nothing else: its first input passes through pairs of Neg."""

    pairs: int = 100
    name: str = "burden"

    @property
    def spec(self) -> PassSpec:
        return PassSpec(self.name, 1, "exact")

    def run(self, model: onnx.ModelProto, context: PassContext) -> PassResult:
        twin = copy_of(model)
        source = twin.graph.input[0].name
        names = [source, *(f"{_BURDEN}{i}" for i in range(2 * self.pairs))]
        for node in twin.graph.node:
            node.input[:] = [names[-1] if name == source else name for name in node.input]
        burden = [helper.make_node("Neg", [a], [b]) for a, b in pairwise(names)]
        nodes = [*burden, *twin.graph.node]
        del twin.graph.node[:]
        twin.graph.node.extend(nodes)
        return PassResult(twin, changed=True)


class Unburden(msgspec.Struct, frozen=True):
    """Take the burden off again."""

    name: str = "unburden"

    @property
    def spec(self) -> PassSpec:
        return PassSpec(self.name, 1, "exact")

    def run(self, model: onnx.ModelProto, context: PassContext) -> PassResult:
        return PassResult(unburdened(model), changed=True)


class Light(msgspec.Struct, frozen=True):
    """Stands for a quantizer: no burden or a doubled one, and weights in steps; finer if ``Refine`` ran before."""

    steps: int = 512
    burdened: bool = False

    @property
    def spec(self) -> PassSpec:
        return PassSpec("light", 1, "lossy", produces="int8")

    def run(self, model: onnx.ModelProto, context: PassContext) -> PassResult:
        twin = unburdened(model)
        if self.burdened:
            twin = Burden(200).run(twin, context).model
        steps = self.steps * (64 if model.producer_name == "refine" else 1)
        for tensor in twin.graph.initializer:
            rounded = np.round(numpy_helper.to_array(tensor) * steps) / steps
            tensor.raw_data = rounded.astype(np.float32).tobytes()
        return PassResult(twin, changed=True)


class Refine(Rename):
    """A repair that goes before the quantizer."""

    def run(self, model: onnx.ModelProto, context: PassContext) -> PassResult:
        twin = copy_of(model)
        twin.producer_name = "refine"
        return PassResult(twin, changed=True)


class Restore(msgspec.Struct, frozen=True):
    """A repair that goes behind the quantizer: takes weights from the model that was quantized."""

    @property
    def spec(self) -> PassSpec:
        return PassSpec("restore", 1, "lossy", "int8", "int8", frozenset({"reference"}))

    def run(self, model: onnx.ModelProto, context: PassContext) -> PassResult:
        assert context.reference is not None
        twin, source = copy_of(model), weights_of(onnx.load(context.reference))
        for tensor in twin.graph.initializer:
            tensor.raw_data = source[tensor.name].tobytes()
        twin.producer_name = onnx.load(context.reference).producer_name
        return PassResult(twin, changed=True)


class Worsen(msgspec.Struct, frozen=True):
    """A repair that does not repair: multiplies all weights."""

    factor: float = 1.2

    @property
    def spec(self) -> PassSpec:
        return PassSpec("worsen", 1, "lossy", "int8", "int8")

    def run(self, model: onnx.ModelProto, context: PassContext) -> PassResult:
        twin = copy_of(model)
        for tensor in twin.graph.initializer:
            tensor.raw_data = (numpy_helper.to_array(tensor) * np.float32(self.factor)).tobytes()
        return PassResult(twin, changed=True)


class LossyNothing(Nothing):
    effect: Effect = "lossy"


class HostBuild(Rename):
    @property
    def spec(self) -> PassSpec:
        return PassSpec("hostbuild", 1, "exact", produces="cpu-build")


def unburdened(model: onnx.ModelProto) -> onnx.ModelProto:
    twin = copy_of(model)
    nodes = [node for node in twin.graph.node if not node.output[0].startswith(_BURDEN)]
    for node in nodes:
        node.input[:] = [twin.graph.input[0].name if name.startswith(_BURDEN) else name for name in node.input]
    del twin.graph.node[:]
    twin.graph.node.extend(nodes)
    return twin


class Bench:
    """One model with all that the search needs, its samples, and a store of its own.

    Args:
        model: The original.
        folder: For the store and temporary files.
        inputs: Rows of input ``x``, axis 0 = samples; the first half calibrates, all of them are search samples.
        rows: Batch sizes of the track, the largest also of the exam.
    """

    def __init__(self, model: Path, folder: Path, inputs: np.ndarray | None = None, rows: tuple[int, ...] = (1,)):
        x = np.random.default_rng(0).standard_normal((60, 64)).astype(np.float32) if inputs is None else inputs
        singles: tuple[Tensors, ...] = tuple({"x": x[i : i + 1]} for i in range(len(x)))
        session = Session(model, CPU, SERVING)
        reference = run_singly(session, singles)
        session.close()
        self.model, self.singles, self.rows = model, singles, rows
        self.original = Form(model, digest_of(model))
        self.store = Store(folder / "store")
        self.samples = HeldOut(singles, reference, decision_for(reference))
        calibration = Samples({"x": x[: len(x) // 2]}, len(x) // 2, batched=True)
        self.context = PassContext(read_host(), calibration.batches(8), work=folder)
        probe = Probe(singles[:4], {name: array[:4] for name, array in reference.items()})
        self.nursery = nursery_of_passes()
        self.workshop = Workshop(self.store, self.nursery, self.context, probe, "inputs")
        self.line = Line(self.original, self.workshop)
        self.exam = Exam(self.samples, "search", "samples", max(rows), 1, self.store, "host")

    @cached_property
    def track(self) -> Track:
        return Track(self.model, self.singles, self.rows, self.store, "host")

    def close(self) -> None:
        self.nursery.close()
        if "track" in self.__dict__:
            self.track.close()


def without_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run passes without a child process each: what isolation adds has its own tests, and costs a second."""

    def run(_: Nursery, folder: Path, *limits: float) -> str:
        isolation.main(str(folder))
        return ""

    monkeypatch.setattr(Nursery, "run", run)


@pytest.fixture
def bench(mlp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    without_processes(monkeypatch)
    made = Bench(mlp, tmp_path)
    yield made
    made.close()


def producer(built: Built) -> str:
    return onnx.load(built.model).producer_name


def test_chain_carries_the_model_through_all_of_its_passes(bench: Bench):
    built = bench.line.build("a", (Rename(), Light(64)), "int8")
    assert (built.failure, built.passes) == ("", ("rename", "light(steps=64)"))
    assert producer(built) == "rename"
    weight = weights_of(onnx.load(built.model))["w1"]
    np.testing.assert_array_equal(weight, np.round(weights_of(onnx.load(bench.model))["w1"] * 64) / 64)
    assert built.form.sha256 == digest_of(built.model)
    assert built.options.config == {"session.x": "1"}
    assert built.size_bytes == built.model.stat().st_size


def test_shared_beginning_of_two_chains_runs_once(bench: Bench):
    for steps in (8, 16):
        bench.line.build("", (Rename(), Light(steps)), "int8")
    assert [record.name for record in bench.line.records] == ["rename", "light(steps=8)", "light(steps=16)"]


def test_same_pass_behind_other_passes_runs_again_and_says_after_what(bench: Bench):
    bench.line.build("", (Light(8),), "int8")
    bench.line.build("", (Rename(), Refine(), Light(8)), "int8")
    after = [record.after for record in bench.line.records if record.name == "light(steps=8)"]
    assert after == [(), ("rename", "refine")]


def test_record_tells_what_the_pass_did(bench: Bench):
    bench.line.build("", (Burden(3), Nothing(), Refuse()), "fp32")
    burden, nothing, refuse = bench.line.records
    assert (burden.status, burden.effect, burden.sqnr_db, burden.cached) == ("applied", "exact", 200, False)
    assert burden.ops_after["Neg"] == 6
    assert "Neg" not in burden.ops_before
    assert (nothing.status, nothing.reason) == ("unchanged", "nothing to do")
    assert (refuse.status, refuse.reason) == ("refused", "this model has no convolutions")


def test_work_of_an_earlier_run_is_taken_from_the_store(bench: Bench):
    first = bench.line.build("", (Rename(), Light(8)), "int8")
    later = Line(bench.original, bench.workshop)
    assert later.build("", (Rename(), Light(8)), "int8").form == first.form
    assert [(record.cached, record.status) for record in later.records] == [(True, "applied")] * 2


def test_failing_pass_ends_its_chain(bench: Bench):
    built = bench.line.build("a", (Rename(), Refuse(), Light(8)), "int8")
    assert built.failure == "refuse: this model has no convolutions"
    assert [record.name for record in bench.line.records] == ["rename", "refuse"]
    assert built.size_bytes == 0


def test_failure_of_the_last_pass_needs_no_label(bench: Bench):
    assert bench.line.build("a", (Rename(), Refuse()), "int8").failure == "this model has no convolutions"


def test_crash_of_a_child_process_is_a_failure(mlp: Path, tmp_path: Path):
    bench = Bench(mlp, tmp_path)  # with real child processes
    built = bench.line.build("a", (Crash(), Light(8)), "int8")
    bench.close()
    assert built.failure == "crash: its process was killed by signal 11"


def test_lossy_pass_that_changes_nothing_is_a_failure(bench: Bench):
    built = bench.line.build("a", (LossyNothing(), Light(8)), "int8")
    assert built.failure == "lossynothing: nothing to convert: nothing to do"
    assert len(bench.line.records) == 1


def test_exact_pass_that_changes_nothing_is_passed_over(bench: Bench):
    built = bench.line.build("a", (Rename(), Nothing()), "fp32", exact=True)
    assert (built.failure, built.exact, producer(built)) == ("", True, "rename")


def test_reference_is_the_last_model_before_quantization(bench: Bench):
    fp32 = bench.line.build("", (Rename(),), "fp32").form
    assert fp32.reference is None
    for chain in ((Rename(), Light(8)), (Rename(), Light(8), Worsen())):
        form = bench.line.build("", chain, "int8").form
        assert (form.reference, form.reference_sha256) == (fp32.model, fp32.sha256)


def test_repair_behind_the_quantizer_sees_the_reference(bench: Bench):
    built = bench.line.build("", (Rename(), Light(2), Restore()), "int8")
    assert built.failure == ""
    assert producer(built) == "rename"
    np.testing.assert_array_equal(weights_of(onnx.load(built.model))["w1"], weights_of(onnx.load(bench.model))["w1"])


def test_only_a_chain_with_a_build_for_this_cpu_is_bound_to_it(bench: Bench):
    assert not bench.line.build("a", (Rename(),), "fp32").host_bound
    assert bench.line.build("a", (Rename(), HostBuild()), "fp32").host_bound


def test_pass_that_is_left_out_is_marked_in_its_own_record_only(bench: Bench):
    bench.line.build("", (Light(8),), "int8")
    bench.line.build("", (Rename(), Light(8)), "int8")
    speed = (Speed.of(Comparison(1, 0.5, 0.4, 0.6, 9, 2.0)),)
    bench.line.annotate(Light(8), (Rename(),), speed, "left out: 0.50x")
    plain, rename, marked = bench.line.records
    assert (marked.status, marked.reason, marked.speed) == ("slower", "left out: 0.50x", speed)
    assert [(r.status, r.speed) for r in (plain, rename)] == [("applied", ())] * 2
    bench.line.annotate(Rename(), (), speed, "")
    assert (bench.line.records[1].status, bench.line.records[1].speed) == ("applied", speed)


def test_gpu_repeats_float_forms_that_are_not_bound_to_the_cpu(bench: Bench):
    line = bench.line
    fp32, bound = line.build("fp32", (Rename(),), "fp32"), line.build("host", (HostBuild(),), "fp32")
    int8 = line.build("int8", (Light(8),), "int8")
    half = msgspec.structs.replace(fp32, name="fp16", precision="fp16")
    made = on_gpu([fp32, bound, int8, half], ("cpu", "cuda"))
    assert [(b.name, b.provider, b.model) for b in made] == [
        ("fp32-cuda", "cuda", fp32.model),
        ("fp16-cuda", "cuda", fp32.model),
    ]
    assert on_gpu([fp32], ("cpu",)) == []


def test_size_counts_external_weights(mlp: Path, tmp_path: Path):
    built = Built("a", "fp32", "cpu", exact=True, form=Form(mlp, "digest"))
    before = built.size_bytes
    (tmp_path / f"{mlp.name}.data").write_bytes(b"x" * 1000)
    assert built.size_bytes == before + 1000
