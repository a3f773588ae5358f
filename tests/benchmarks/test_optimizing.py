"""The comparison with what users do today: what nobody sees, who takes part, and what counts as kept."""

import json
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest

from benchmarks.optimizing import contest
from benchmarks.optimizing.__main__ import _parser, main, plan_of
from benchmarks.optimizing.contest import Plan, compare
from benchmarks.optimizing.material import drawn, set_aside
from benchmarks.optimizing.results import (
    ORIGINAL,
    ORIGINAL_ONE,
    OURS,
    OURS_DEFAULTS,
    Comparison,
    Judged,
    Report,
    Row,
    promise_kept,
)
from benchmarks.optimizing.tables import render, summary, table
from benchmarks.peers import ort_recipe
from benchmarks.peers.asking import ORT_DEFAULTS, PEERS, Peer, PeerFailed, ask_peer, options_of
from benchmarks.peers.protocol import feeds_of, is_convolutional
from benchmarks.zoo.odd import FIXED_ROWS, ODD, save
from optimizers.api import Result, Task
from optimizers.errors import CalibrationError
from optimizers.graph import op_counts, signature_of
from optimizers.intervals import wilson
from optimizers.recipe import Recipe, VariantPlan
from optimizers.records import Speed
from optimizers.search import Gate
from server.artifact import Fidelity
from server.host import HostFacts
from server.providers import CPU
from server.session import Session
from tests import models
from tests.optimizers.test_building import without_processes

RECIPE = Recipe(
    precisions=("fp32",), compressions=(), devices=("cpu",), batch_rows=(1, 8), variants=(VariantPlan("a", "fp32", ()),)
)
"""One variant without any pass: what is tested here is the comparison."""

HOST = HostFacts("a CPU", ("avx512_vnni",), 2)
GATE = Gate(0.99, 0.01)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with 240 samples and their labels."""
    place = tmp_path_factory.mktemp("zoo")
    models.save_mlp(place / "model.onnx")
    np.savez(place / "data.npz", x=np.random.default_rng(0).standard_normal((240, 64)).astype(np.float32))
    np.savez(place / "labels.npz", labels=np.arange(240) % 10)
    return place


def script(name: str, code: str) -> Peer:
    """A peer that runs these lines; ``request`` and ``answer`` are what it was given."""
    start = "import json, pathlib, sys; request = json.load(open(sys.argv[1])); answer = pathlib.Path(sys.argv[2])\n"
    return Peer(name, (sys.executable, "-c", start + code))


def answering(name: str, model: Path, session: dict | None = None) -> Peer:
    said = json.dumps({"model": str(model), "session": session or {}, "notes": ["made elsewhere"]})
    return script(name, f"answer.write_text({said!r})")


def held(folder: Path, tmp_path: Path, *peers: Peer) -> Comparison:
    plan = Plan(tmp_path / "models", peers, RECIPE, 0.1, 0.05, 60.0, least_rounds=3)
    return compare("mlp", "a dense model", folder, tmp_path / "work", plan, lambda _: None)


def with_other_answers(model: Path, path: Path) -> Path:
    other = onnx.load(model)
    for tensor in other.graph.initializer:
        tensor.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(tensor), tensor.name))
    onnx.save(other, path)
    return path


def with_one_row(model: Path, path: Path) -> Path:
    fixed = onnx.load(model)
    for value in (*fixed.graph.input, *fixed.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(fixed, path)
    return path


@dataclass
class Contest:
    """One contest with every kind of peer; the files are what each side was given."""

    found: Comparison
    parts: Path
    ours: Path
    theirs: Path
    our_labels: int


@pytest.fixture(scope="module")
def contested(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Contest:
    place = tmp_path_factory.mktemp("contest")
    ours, theirs, labels = place / "ours.npz", place / "theirs.npz", []
    really = contest.optimize

    def spying(task: Task) -> Result:
        shutil.copy(task.calibration, ours)
        labels.append(len(np.load(task.labels)["labels"]))
        return really(task)

    peers = (
        PEERS["ort"],
        script("Failing", "print('one line'); sys.exit('ValueError: no kernel for Foo')"),
        Peer("Absent", ("/nowhere/python",), "run: install it"),
        script("Spy", f"import shutil; shutil.copy(request['data'], {str(theirs)!r}); sys.exit(1)"),
        answering("Wrong", with_other_answers(folder / "model.onnx", place / "o.onnx"), {"intra_op_num_threads": 1}),
        answering("Fixed", with_one_row(folder / "model.onnx", place / "f.onnx")),
    )
    with pytest.MonkeyPatch.context() as patch:
        without_processes(patch)
        patch.setattr("optimizers.trial.session_memory", lambda *_: None)
        patch.setattr(contest, "optimize", spying)
        found = held(folder, place, *peers)
    return Contest(found, place / "work" / "samples", ours, theirs, labels[0])


def rows_in(path: Path) -> set[bytes]:
    return {row.tobytes() for row in np.load(path)["x"]}


def test_nobody_gets_the_unseen_samples(contested: Contest, folder: Path) -> None:
    unseen, everything = rows_in(contested.parts / "unseen.npz"), rows_in(folder / "data.npz")
    assert (len(unseen), len(everything), contested.our_labels) == (100, 240, 140)
    assert rows_in(contested.ours) == everything - unseen
    assert rows_in(contested.theirs) < everything - unseen


def test_equal_samples_are_not_on_both_sides() -> None:
    array = np.repeat(np.arange(50), 2)[:, None]
    seen, unseen, repeated = drawn({"x": array}, 100, seed=0)
    assert not set(array[seen, 0]) & set(array[unseen, 0])
    assert repeated == 100 - len(seen) - len(unseen) > 0


@pytest.mark.parametrize(("count", "unseen"), [(1000, 300), (240, 100), (100, 50), (2, 1)])
def test_how_many_are_set_aside(count: int, unseen: int) -> None:
    assert len(drawn({"x": np.arange(count)}, count, seed=0)[1]) == unseen


def test_labels_go_with_their_samples(folder: Path, tmp_path: Path) -> None:
    data = np.load(folder / "data.npz")["x"]
    np.savez(folder / "labels.npz", labels=data[:, 0].view(np.int32))
    material = set_aside(folder, tmp_path / "parts", RECIPE)
    assert material.unseen.labels is not None
    assert [int(material.unseen.batch(i, 1)["x"][0, 0].view(np.int32)) for i in range(100)] == list(
        material.unseen.labels
    )
    seen = np.load(material.seen)["x"][:, 0].view(np.int32)
    np.testing.assert_array_equal(np.load(material.seen_labels)["labels"], seen)


def test_everybody_is_in_the_table_also_who_failed(contested: Contest) -> None:
    found, peers = contested.found, ["ORT recipe", "Failing", "Absent", "Spy", "Wrong", "Fixed"]
    assert [row.name for row in found.rows] == [ORIGINAL, ORIGINAL_ONE, *peers, OURS_DEFAULTS, OURS]
    lines = table(found).splitlines()
    assert len(lines) == 2 + len(found.rows)
    assert len({line.count("|") for line in lines}) == 1
    assert [line.split("|")[1].strip() for line in lines[2:]] == [row.name for row in found.rows]
    assert "failed: exit code 1: ValueError: no kernel for Foo" in lines[5]
    assert "failed: run: install it" in lines[6]
    assert summary([found]).count("failed") == 4


def test_who_takes_part_is_raced_and_compared(contested: Contest) -> None:
    found = contested.found
    for row in (row for row in found.rows if not row.failure):
        assert row.latency is not None
        assert {1, 8} <= set(row.latency.rows)
        assert row.fidelity is not None
        assert row.fidelity.samples == found.unseen == 100
        assert row.fidelity.accuracy is not None
        assert [speed.rows for speed in row.ours] == ([] if row.name == OURS else list(row.latency.rows))


def test_the_recipe_of_onnxruntime_makes_a_model(contested: Contest) -> None:
    row = contested.found.row("ORT recipe")
    assert row.notes == ("quantize_dynamic: INT8 weights",)
    assert row.wall_s > 0 < row.cpu_s
    assert 0 < row.size_bytes < contested.found.row(ORIGINAL).size_bytes


def test_a_peer_with_other_answers_breaks_the_promise(contested: Contest) -> None:
    wrong = contested.found.row("Wrong")
    assert (wrong.promise, wrong.notes) == ("broken", ("made elsewhere",))
    assert contested.found.row(OURS).promise == "kept"  # 100 samples cannot show 0.99
    assert "it breaks the promise" in summary([contested.found])


def test_a_peer_that_cannot_take_a_batch_is_out_with_its_reason(contested: Contest) -> None:
    assert re.match(r"(?s)does not run: .*Expected: 1", contested.found.row("Fixed").failure)


def test_an_optimizer_that_fails_is_shown(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(task):
        raise CalibrationError("no such input")

    monkeypatch.setattr(contest, "optimize", failing)
    found = held(folder, tmp_path)
    assert found.row(OURS).failure == "CalibrationError: no such input"
    assert found.row(ORIGINAL).latency is not None
    assert found.complaints == (f"mlp: {OURS} failed: CalibrationError: no such input",)
    assert "failed: CalibrationError" in render(Report({}, (found,)))


@pytest.mark.parametrize(
    ("misses", "samples", "promise"), [(0, 1000, "shown"), (0, 100, "kept"), (2, 100, "not shown"), (8, 100, "broken")]
)
def test_a_promise_of_agreement(misses: int, samples: int, promise: str) -> None:
    assert promise_kept(fidelity_of_misses(misses, samples), GATE) == promise


@pytest.mark.parametrize(
    ("drop", "high", "promise"), [(0.0, 0.005, "shown"), (0.0, 0.02, "kept"), (0.02, 0.04, "not shown")]
)
def test_a_promise_of_accuracy(drop: float, high: float, promise: str) -> None:
    found = fidelity_of_misses(0, 1000)
    found = msgspec.structs.replace(found, accuracy=0.9 - drop, accuracy_original=0.9, accuracy_drop_high=high)
    assert promise_kept(found, GATE) == promise
    assert promise_kept(msgspec.structs.replace(found, accuracy=0.8, accuracy_drop_high=0.12), GATE) == "broken"


def fidelity_of_misses(misses: int, samples: int) -> Fidelity:
    hits = samples - misses
    return Fidelity(samples, hits / samples, wilson(hits, samples)[0], "top1", 1.0, 1.0, 40.0)


def compared(**changes: object) -> Comparison:
    """Ours is slower than a peer at batch 8 and 16, of which 16 is the best."""
    slower = tuple(Speed(rows, 0.8, 0.7, 0.9, 20, 1.0, "slower") for rows in (8, 16))
    peer = Row("Peer", ours=(Speed(1, 1.0, 0.9, 1.1, 20, 1.0, "indistinguishable"), *slower), promise="kept")
    judged = (Judged("original", "baseline", "as it is"), Judged("bf16", "refused", "no BF16 kernels"))
    plain = Comparison("m", "", GATE, 1, 1, 0, "", "a", 16, (peer, Row(OURS, promise="kept")), judged)
    return msgspec.structs.replace(plain, **changes)


def test_slower_than_a_faithful_peer_is_a_complaint() -> None:
    assert compared().complaints == ("m: slower than Peer at batch 16: 0.80x (0.70-0.90)",)


def test_slower_than_a_peer_that_breaks_the_promise_is_none() -> None:
    peer = msgspec.structs.replace(compared().row("Peer"), promise="broken")
    assert compared(rows=(peer, Row(OURS))).complaints == ()


def test_a_broken_promise_of_ours_is_a_complaint() -> None:
    found = compared(rows=(Row(OURS, promise="broken"),))
    assert found.complaints == ("m: the promise is broken on unseen samples",)
    assert found.complaints[0] in render(Report({}, (found,)))


def test_verdicts_without_numbers_are_named() -> None:
    assert compared().unnumbered == ("bf16",)
    assert compared(judged=(Judged("a", "served", "1.2x at batch 1"),)).unnumbered == ()


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("pass", "no usable answer"),
        ("answer.write_text('[]')", "no usable answer"),
        ("import os; os.abort()", "exit code -6: no message"),
    ],
)
def test_what_a_peer_can_do_wrong(folder: Path, tmp_path: Path, code: str, reason: str) -> None:
    with pytest.raises(PeerFailed, match=reason):
        ask_peer(script("p", code), folder / "model.onnx", folder / "data.npz", HOST, tmp_path / "out", 60)


def test_a_peer_that_hangs_is_ended(folder: Path, tmp_path: Path) -> None:
    hanging = script("p", "import threading; threading.Event().wait()")
    with pytest.raises(PeerFailed, match="not finished after 0 s"):
        ask_peer(hanging, folder / "model.onnx", folder / "data.npz", HOST, tmp_path / "out", 0.3)


def test_a_peers_session_settings_are_taken_over() -> None:
    config = {"session.intra_op.allow_spinning": "0", "session.x": 1}
    settings = {"intra_op_num_threads": 2, "graph_optimization_level": 99, "extra_session_config": config}
    options, notes = options_of({**settings, "inter_op_num_threads": 1, "execution_mode": 1})
    assert (options.intra_op_threads, options.spinning, options.graph_level) == (2, False, "all")
    assert options.config == {"session.x": "1"}
    assert notes == ["left out: execution_mode = 1"]
    assert options_of({}) == (ORT_DEFAULTS, [])


def test_convolutions_are_quantized_statically(tmp_path: Path) -> None:
    # A convolution in front of what the other models have is enough to tell them apart.
    weight = onnx.numpy_helper.from_array(np.ones((4, 1, 3, 3), np.float32), "w")
    node = onnx.helper.make_node("Conv", ["x", "w"], ["y"], name="conv")
    values = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N", channels, None, None])
        for name, channels in (("x", 1), ("y", 4))
    ]
    graph = onnx.helper.make_graph([node], "g", values[:1], values[1:], [weight])
    opset = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=8), tmp_path / "model.onnx")
    np.savez(tmp_path / "data.npz", x=np.random.default_rng(0).standard_normal((4, 1, 6, 6)).astype(np.float32))
    assert is_convolutional(str(tmp_path / "model.onnx"))
    request = {"model": str(tmp_path / "model.onnx"), "data": str(tmp_path / "data.npz")}
    (tmp_path / "out").mkdir()
    made = ort_recipe.quantized({**request, "output": str(tmp_path / "out"), "int8_dot": False})
    assert made["notes"] == ["quantize_static: QDQ, MinMax, per channel, U8S8", "7-bit weights"]
    assert "QuantizeLinear" in op_counts(onnx.load(made["model"]))


def test_complete_tensors_are_fed_as_they_are(tmp_path: Path) -> None:
    folder = save(ODD["odd-fixed-batch"], tmp_path, samples=3)
    feeds = feeds_of(str(folder / "model.onnx"), str(folder / "data.npz"))
    assert [feed["x"].shape for feed in feeds] == [(FIXED_ROWS, 64)] * 3


@pytest.mark.parametrize("name", ODD)
def test_odd_models_are_odd(tmp_path: Path, name: str) -> None:
    folder = save(ODD[name], tmp_path, samples=40)
    model = onnx.load(folder / "model.onnx")
    ops, signature = op_counts(model), signature_of(model)
    fixed, turned = name == "odd-fixed-batch", name == "odd-batch-last"
    assert ("QuantizeLinear" in ops) == (name == "odd-quantized")
    assert (ops.get("Constant", 0) == 6) == (name == "odd-constants")
    assert (signature.inputs[0].shape[0] == FIXED_ROWS) == fixed
    assert isinstance(signature.outputs[0].shape[-1], str) == turned
    session = Session(folder / "model.onnx", CPU, ORT_DEFAULTS)
    rows = np.load(folder / "data.npz")["x"]
    answer = session.run({"x": rows[0] if fixed else rows[:FIXED_ROWS]})["y"]
    assert answer.shape == ((10, FIXED_ROWS) if turned else (FIXED_ROWS, 10))


def test_documented_gates_are_promised() -> None:
    options = _parser().parse_args([])
    assert plan_of("minilm-l6", options).recipe == Recipe(min_agreement=0.97, max_accuracy_drop=0.02)
    assert plan_of("magika", options).recipe == Recipe()
    assert [peer.name for peer in plan_of("magika", options).peers] == ["ORT recipe", "Olive"]


def test_unknown_names_are_refused(capsys: pytest.CaptureFixture) -> None:
    assert main(["no-such-model", "--peers", "ort,nobody"]) == 2
    assert "unknown: no-such-model, nobody; there are" in capsys.readouterr().err
