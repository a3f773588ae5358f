"""Bound runs on the CPU: the same code as on a GPU, with the CPU's memory and without graphs being captured."""

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from server import bound
from server.artifact import SessionOptions
from server.bound import (
    CAPTURING_RUNS,
    MOST_SHAPES,
    RUNNERS,
    BoundSession,
    Gate,
    bind,
    graph_rows_of,
)
from server.device_memory import Memory
from server.errors import ArtifactError, InferenceFailed
from server.providers import CPU, GRAPH_ROWS, Device, open_ort_session, ort_errors, usable_devices
from server.session import Session
from tests import models
from tests.artifacts import random_inputs

TIMEOUT_S = 30


class CountedMemory(Memory):
    """The CPU's memory, which counts what is allocated."""

    __slots__ = ("allocated",)

    def __init__(self, pin: Any = lambda _buffer: None) -> None:
        super().__init__("cpu", 0, pin)
        object.__setattr__(self, "allocated", [])

    def tensor(self, spec: Any, shape: tuple[int, ...]) -> Any:
        self.allocated.append(shape)
        return super().tensor(spec, shape)


class Watched:
    """onnxruntime's session, which notes the graph of every run and where its outputs lie."""

    def __init__(self, path: Path, before: Any = lambda: None) -> None:
        self.session: Any = open_ort_session(path, CPU, SessionOptions())
        self.graphs: list[tuple[str, tuple[int, ...]]] = []
        self.plain: list[str] = []
        self.before = before

    def io_binding(self) -> Any:
        return self.session.io_binding()

    def run(self, names: list[str], inputs: Any, options: Any) -> Any:
        self.plain.append(options.get_run_config_entry("gpu_graph_id"))
        return self.session.run(names, inputs, options)

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        self.before()
        self.session.run_with_iobinding(binding, options)
        addresses = tuple(output.data_ptr() for output in binding.get_outputs())
        self.graphs.append((options.get_run_config_entry("gpu_graph_id"), addresses))


def opened(path: Path, rows: frozenset[int] = frozenset(), memory: Memory | None = None) -> Session:
    session = Session(path, CPU, SessionOptions())
    session._session = BoundSession(session._session, session.signature, memory or Memory("cpu"), rows)
    return session


def watched(path: Path, rows: frozenset[int] = frozenset(), memory: Memory | None = None, **more: Any) -> Any:
    """A bound session, and what it runs."""
    session = Watched(path, **more)
    signature = Session(path, CPU, SessionOptions()).signature
    return BoundSession(session, signature, memory or Memory("cpu"), rows), session


def x_of(rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).standard_normal((rows, 64)).astype(np.float32)}


@pytest.mark.parametrize("save", [models.save_mlp, models.save_cnn, models.save_two_inputs, models.save_sequence])
@pytest.mark.parametrize("rows", [frozenset(), frozenset({1, 4})], ids=["no graphs", "graphs"])
def test_growing_and_shrinking_batches_are_answered_as_by_a_plain_session(
    tmp_path: Path, save: Any, rows: frozenset[int]
) -> None:
    path = save(tmp_path / "model.onnx")
    plain, session = Session(path, CPU, SessionOptions()), opened(path, rows)
    for seed, count in enumerate((1, 4, 32, 4, 1, 4, 7, 1)):
        inputs = random_inputs(plain.signature, rows=count, seed=seed)
        expected, seen = plain.run(inputs), session.run(inputs)
        assert list(seen) == list(expected)
        for name, array in expected.items():
            assert seen[name].dtype == array.dtype
            np.testing.assert_array_equal(seen[name], array)


def test_returned_arrays_do_not_change_with_the_next_runs(mlp: Path) -> None:
    session, plain = opened(mlp), Session(mlp, CPU, SessionOptions())
    answers = [session.run(x_of(4, seed))["y"] for seed in range(6)]
    for seed, answer in enumerate(answers):
        assert answer.flags.owndata
        assert answer.flags.writeable
        np.testing.assert_array_equal(answer, plain.run(x_of(4, seed))["y"])


def test_inputs_may_be_views_are_not_kept_and_not_written_to(mlp: Path) -> None:
    session, plain = opened(mlp), Session(mlp, CPU, SessionOptions())
    wide = np.random.default_rng(0).standard_normal((4, 128)).astype(np.float32)
    view = wide[::2, ::2]
    body = np.frombuffer(view.tobytes(), np.float32).reshape(2, 64)
    expected = plain.run({"x": np.ascontiguousarray(view)})["y"]
    np.testing.assert_array_equal(session.run({"x": view})["y"], expected)
    answer = session.run({"x": body})["y"]
    wide[:] = 0
    np.testing.assert_array_equal(answer, expected)
    np.testing.assert_array_equal(session.run({"x": body})["y"], expected)


def test_wanted_outputs_come_in_the_order_asked_for(tmp_path: Path) -> None:
    session = opened(models.save_two_inputs(tmp_path / "two.onnx"))
    inputs = {"b": np.full((2, 4), 1, np.float32), "a": np.full((2, 4), 3, np.float32)}
    for _ in range(3):
        assert [a.tolist() for a in session.run(inputs, ("diff", "sum")).values()] == [[[2.0] * 4] * 2, [[4.0] * 4] * 2]
        assert list(session.run(inputs, ("sum",))) == ["sum"]


def test_buffers_of_a_shape_are_allocated_once(mlp: Path) -> None:
    memory = CountedMemory()
    session = opened(mlp, memory=memory)
    for rows in (2, 8, 2, 8, 2):
        session.run(x_of(rows))
    assert memory.allocated == [(2, 64), (8, 64)]


def test_the_shape_that_was_not_used_for_longest_loses_its_buffers(mlp: Path) -> None:
    memory = CountedMemory()
    session = opened(mlp, memory=memory)
    for rows in range(1, MOST_SHAPES + 2):
        session.run(x_of(rows))
        session.run(x_of(2))
    memory.allocated.clear()
    session.run(x_of(2))
    session.run(x_of(3))
    assert memory.allocated == []
    session.run(x_of(1))
    assert memory.allocated == [(1, 64)]


def test_buffers_hold_a_limited_number_of_bytes_and_larger_batches_still_run(
    mlp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bound, "MOST_BYTES", 10 * (64 + 10) * 4)  # ten rows in and out
    memory = CountedMemory()
    session = opened(mlp, memory=memory)
    for rows in (4, 6, 4, 6):
        session.run(x_of(rows))
    assert len(memory.allocated) == 2
    assert session.run(x_of(40))["y"].shape == (40, 10)
    session.run(x_of(4))
    assert memory.allocated == [(4, 64), (6, 64), (40, 64), (4, 64)]


def test_staging_grows_with_the_largest_batch_and_is_pinned_when_it_does(mlp: Path) -> None:
    pinned: list[int] = []
    session = opened(mlp, memory=CountedMemory(lambda buffer: pinned.append(buffer.nbytes)))
    for rows in (1, 3, 2, 4, 1):
        session.run(x_of(rows))
    assert pinned == [256, 1024]


def test_eight_threads_get_their_own_answers(mlp: Path) -> None:
    session, plain = opened(mlp), Session(mlp, CPU, SessionOptions())
    expected = [plain.run(x_of(5, seed))["y"] for seed in range(8)]

    def work(seed: int) -> bool:
        return all(np.array_equal(session.run(x_of(5, seed))["y"], expected[seed]) for _ in range(50))

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == [True] * 8


def test_two_runs_compute_at_a_time(mlp: Path) -> None:
    both = threading.Barrier(RUNNERS)
    session, _ = watched(mlp, before=lambda: both.wait(TIMEOUT_S))
    with ThreadPoolExecutor(RUNNERS) as pool:
        answers = list(pool.map(lambda seed: session.run(["y"], x_of(2, seed)), range(RUNNERS)))
    assert len(answers) == RUNNERS


def test_with_graphs_one_run_computes_while_another_is_copied(mlp: Path) -> None:
    copied, computing, turn, threads = threading.Event(), threading.Event(), threading.Lock(), set()

    def compute() -> None:
        threads.add(threading.get_ident())
        assert turn.acquire(blocking=False), "two runs compute at a time"
        try:
            if not computing.is_set():
                computing.set()
                assert copied.wait(TIMEOUT_S)
        finally:
            turn.release()

    def pin(_buffer: np.ndarray) -> None:
        if computing.is_set():
            copied.set()

    session, _ = watched(mlp, frozenset({2}), Memory("cpu", 0, pin), before=compute)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(session.run, ["y"], x_of(2))
        assert computing.wait(TIMEOUT_S)
        second = pool.submit(session.run, ["y"], x_of(2))
        np.testing.assert_array_equal(first.result(TIMEOUT_S)[0], second.result(TIMEOUT_S)[0])
        for answer in [pool.submit(session.run, ["y"], x_of(rows)) for rows in (2, 3) * 50]:
            answer.result(TIMEOUT_S)
    assert len(threads) == 1, "onnxruntime keeps graphs per thread"


CAPTURE = ["-1", *["1"] * CAPTURING_RUNS]


def test_a_graph_is_captured_at_once_has_fixed_addresses_and_other_sizes_have_none(mlp: Path) -> None:
    session, seen = watched(mlp, frozenset({4}))
    for rows in (4, 4, 2, 4, 2, 4):
        session.run(["y"], x_of(rows))
    assert [graph for graph, _ in seen.graphs] == [*CAPTURE, "1", "-1", "1", "-1", "1"]
    assert len({addresses for graph, addresses in seen.graphs if graph == "1"}) == 1


def test_nothing_is_copied_while_a_graph_is_captured(mlp: Path) -> None:
    gate = bound._CAPTURES

    class Capturing(Watched):
        def run_with_iobinding(self, binding: Any, options: Any) -> None:
            captures = options.get_run_config_entry("gpu_graph_id") == "1" and len(self.graphs) <= CAPTURING_RUNS
            assert gate._is_closed == captures
            assert gate._inside == (0 if captures else 1)
            super().run_with_iobinding(binding, options)

    copies: list[int] = []
    memory = Memory("cpu", 0, lambda _buffer: copies.append(gate._inside))
    session = BoundSession(Capturing(mlp), Session(mlp, CPU, SessionOptions()).signature, memory, frozenset({4}))
    for rows in (4, 4, 8):
        session.run(["y"], x_of(rows))
    with pytest.raises(ort_errors(), match="Got: 63"):
        session.run(["y"], {"x": np.zeros((1, 63), np.float32)})
    assert copies == [1, 1]
    assert (gate._inside, gate._is_closed) == (0, False)


def test_capture_that_fails_is_logged_and_the_session_goes_on_without_graphs(
    mlp: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Uncapturable(Watched):
        def run_with_iobinding(self, binding: Any, options: Any) -> None:
            if options.get_run_config_entry("gpu_graph_id") != "-1":
                raise RuntimeError("operation not permitted when stream is capturing")
            super().run_with_iobinding(binding, options)

    plain = Session(mlp, CPU, SessionOptions())
    session = BoundSession(Uncapturable(mlp), plain.signature, Memory("cpu"), frozenset({2, 4}))
    for rows in (2, 4, 2, 4):
        np.testing.assert_array_equal(session.run(["y"], x_of(rows))[0], plain.run(x_of(rows))["y"])
    assert caplog.text.count("a CUDA graph cannot be captured") == 1


def test_runners_never_share_a_graph(mlp: Path) -> None:
    session, seen = watched(mlp, frozenset({4}))
    session.run(["y"], x_of(4))
    first = session._idle.get()  # a run in progress keeps its runner
    try:
        session.run(["y"], x_of(4))
    finally:
        session._idle.put(first)
    session.run(["y"], x_of(4))
    assert [graph for graph, _ in seen.graphs] == [*CAPTURE, "-1", *["2"] * CAPTURING_RUNS, "1"]


def test_buffers_of_a_graph_stay(mlp: Path) -> None:
    memory = CountedMemory()
    session, seen = watched(mlp, frozenset({1}), memory)
    for rows in range(1, MOST_SHAPES + 4):
        session.run(["y"], x_of(rows))
    session.run(["y"], x_of(1))
    assert memory.allocated.count((1, 64)) == 1
    assert seen.graphs[-1][0] == "1"


def test_graphs_take_a_limited_number_of_bytes(mlp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bound, "MOST_BYTES", 10 * (64 + 10) * 4)  # ten rows in and out
    session, seen = watched(mlp, frozenset({4, 5, 6}))
    for rows in (4, 5, 6, 6):
        session.run(["y"], x_of(rows))
    assert [graph for graph, _ in seen.graphs] == [*CAPTURE, "-1", *["2"] * CAPTURING_RUNS, "-1", "-1"]


def test_gate_lets_nobody_in_beside_one_who_is_alone() -> None:
    gate = Gate()
    entered, seen = threading.Event(), []

    def alone() -> None:
        entered.set()
        with gate.alone():
            seen.append("alone")

    with ThreadPoolExecutor(2) as pool:
        with gate.shared(), gate.shared():
            waiting = pool.submit(alone)
            assert entered.wait(TIMEOUT_S)
            seen.append("shared")
        waiting.result(TIMEOUT_S)
        with gate.alone():
            later = pool.submit(lambda: gate.shared().__enter__())
            seen.append("alone again")
            assert not later.done()
        later.result(TIMEOUT_S)
    assert seen == ["shared", "alone", "alone again"]


BAD_INPUTS = [
    {"x": np.zeros((1, 63), np.float32)},
    {"x": np.zeros((1, 64), np.float64)},
    {"x": np.zeros(64, np.float32)},
    {"z": np.zeros((1, 64), np.float32)},
    {"x": np.zeros((1, 64), np.float32), "z": np.zeros(1, np.float32)},
    {},
]


@pytest.mark.parametrize("inputs", BAD_INPUTS, ids=["size", "dtype", "rank", "name", "unknown", "none"])
def test_what_does_not_fit_fails_with_the_error_of_a_plain_session(mlp: Path, inputs: dict) -> None:
    session = opened(mlp)
    good = session.run(x_of(1))["y"]
    with pytest.raises(InferenceFailed) as expected:
        Session(mlp, CPU, SessionOptions()).run(inputs)
    with pytest.raises(InferenceFailed) as seen:
        session.run(inputs)
    assert str(seen.value) == str(expected.value)
    np.testing.assert_array_equal(session.run(x_of(1))["y"], good)


def test_unknown_output_fails(mlp: Path) -> None:
    with pytest.raises(InferenceFailed, match="Invalid output name"):
        opened(mlp).run(x_of(1), ("nothing",))


def test_failing_kernel_fails_as_inference_and_the_next_run_is_right(tmp_path: Path) -> None:
    path = models.save_sequence(tmp_path / "sequence.onnx")
    session, plain = opened(path), Session(path, CPU, SessionOptions())
    good = {"ids": np.ones((1, 2), np.int64), "mask": np.ones((1, 2), np.int64)}
    for _ in range(2):
        session.run(good)
        with pytest.raises(InferenceFailed, match="indices element out of data bounds"):
            session.run({**good, "ids": np.full((1, 2), 1000)})
        np.testing.assert_array_equal(session.run(good)["vector"], plain.run(good)["vector"])


def test_a_failure_gives_back_the_buffers_but_those_of_graphs(tmp_path: Path) -> None:
    memory = CountedMemory()
    session = opened(models.save_sequence(tmp_path / "sequence.onnx"), frozenset({2}), memory)

    def good(rows: int) -> dict[str, np.ndarray]:
        return {"ids": np.ones((rows, 2), np.int64), "mask": np.ones((rows, 2), np.int64)}

    session.run(good(2))
    session.run(good(3))
    with pytest.raises(InferenceFailed, match="out of data bounds"):
        session.run({**good(4), "ids": np.full((4, 2), 1000)})
    memory.allocated.clear()
    session.run(good(2))
    assert memory.allocated == []
    session.run(good(3))
    assert memory.allocated == [(3, 2)] * 2


def test_batch_without_rows_needs_no_buffers(mlp: Path) -> None:
    session, seen = watched(mlp)
    assert session.run(["y"], x_of(0))[0].shape == (0, 10)
    assert seen.plain == ["-1"]


def test_closed_session_does_not_run_and_its_buffers_are_gone(mlp: Path) -> None:
    gone = threading.Event()
    buffers: list[int] = []

    def pin(buffer: np.ndarray) -> None:
        buffers.append(buffer.nbytes)
        weakref.finalize(buffer, gone.set)

    session = opened(mlp, memory=Memory("cpu", 0, pin))
    session.run(x_of(2))
    assert buffers
    assert not gone.is_set()
    session.close()
    with pytest.raises(InferenceFailed, match="is closed"):
        session.run(x_of(2))
    gc.collect()
    assert gone.is_set()


def save_nonzero(path: Path, size: str) -> Path:
    """x FP32 [n] -> positions INT64 [1, size] of what is not 0."""
    graph = helper.make_graph(
        [helper.make_node("NonZero", ["x"], ["positions"])],
        "nonzero",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])],
        [helper.make_tensor_value_info("positions", TensorProto.INT64, [1, size])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.mark.parametrize("size", ["found", "n"], ids=["an axis of its own", "declared as the input's"])
def test_outputs_whose_size_follows_from_the_data_are_right(tmp_path: Path, size: str) -> None:
    session = opened(save_nonzero(tmp_path / "nonzero.onnx", size), frozenset({4}))
    for x in ([1, 2, 3, 4], [0, 2, 0, 4], [0, 0, 0, 4], [1, 2, 3, 4], [0, 2, 0, 4]):
        array = np.array(x, np.float32)
        for _ in range(2):
            assert session.run({"x": array})["positions"].tolist() == [np.flatnonzero(array).tolist()]


def test_model_that_declares_wrong_sizes_is_believed_once_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    session, seen = watched(save_nonzero(tmp_path / "nonzero.onnx", "n"))
    full, half = np.array([1, 2], np.float32), np.array([0, 2], np.float32)
    for x in (full, half, full, half, full, half):
        session.run(["positions"], {"x": x})
    assert seen.plain == ["-1"]
    assert caplog.text.count("a bound run failed where a plain one, which is slower, did not: ") == 1


def test_text_and_the_cpu_run_without_buffers(tmp_path: Path, mlp: Path) -> None:
    strings = Session(models.save_strings(tmp_path / "strings.onnx"), CPU, SessionOptions())
    assert bind(strings._session, strings.signature, Device("cuda"), {}) is strings._session
    plain = Session(mlp, CPU, SessionOptions())
    assert bind(plain._session, plain.signature, CPU, {}) is plain._session


def test_gpu_sessions_are_bound(mlp: Path) -> None:
    plain = Session(mlp, CPU, SessionOptions())
    made = bind(plain._session, plain.signature, Device("cuda", 1), {GRAPH_ROWS: "1, 8"})
    assert isinstance(made, BoundSession)


def test_placement_is_that_of_the_session(mlp: Path) -> None:
    options = SessionOptions(config={"session.record_ep_graph_assignment_info": "1"})
    session = Session(mlp, CPU, options)
    expected = session.placement()
    session._session = BoundSession(session._session, session.signature, Memory("cpu"))
    assert session.placement() == expected != {}


@pytest.mark.parametrize("text", ["1;8", "one", "1,,8", "-1", "1.5"])
def test_wrong_sizes_of_graphs_are_refused(text: str) -> None:
    with pytest.raises(ArtifactError, match=r"slipstream\.cuda_graph_rows is .* separated by commas"):
        graph_rows_of({GRAPH_ROWS: text})


def test_sizes_of_graphs_are_read() -> None:
    assert graph_rows_of({GRAPH_ROWS: "1, 8,32"}) == {1, 8, 32}
    assert graph_rows_of({}) == frozenset()


@pytest.mark.gpu
@pytest.mark.parametrize("save", [models.save_mlp, models.save_cnn, models.save_sequence])
def test_gpu_answers_are_those_of_plain_runs_on_the_same_gpu(tmp_path: Path, save: Any) -> None:
    device = usable_devices("prefer")[0]
    if device == CPU:
        pytest.skip("no GPU works here")
    session = Session(save(tmp_path / "model.onnx"), device, SessionOptions())
    plain = open_ort_session(tmp_path / "model.onnx", device, SessionOptions())
    for seed, rows in enumerate((1, 4, 32, 4, 1)):
        inputs = random_inputs(session.signature, rows=rows, seed=seed)
        for seen, expected in zip(session.run(inputs).values(), plain.run(None, inputs), strict=True):
            np.testing.assert_array_equal(seen, expected)
