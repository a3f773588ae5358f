"""Bound runs: tensors at fixed addresses of a device, for onnxruntime sessions that do not run on the CPU.

::

    caller's array -> staging (host, pinned) -> input on the device -> run -> output on the device -> new array

A plain ``run`` allocates memory on the device and copies through unpinned memory each time. Here buffers are kept per
combination of input shapes, and only the elements move. Fixed addresses are also what a CUDA graph needs. Two runners
with buffers of their own let one batch be copied while another one is computed: onnxruntime gives every run that is in
progress a stream of its own.

All that differs between devices is ``device_memory.Memory``, so the same code runs, and is tested, on the CPU.
Unverified on GPU.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import count
from queue import LifoQueue
from typing import Any

from server.device_memory import Memory, Staging, memory_of
from server.errors import ArtifactError, SignatureMismatch
from server.providers import GRAPH_ROWS, Device, ort_errors
from server.tensors import Array, Dimension, Signature, Tensors

with suppress(ImportError):  # check_environment() tells the user which form of it to install
    import onnxruntime

logger = logging.getLogger(__name__)

RUNNERS = 2
"""Runs of one session at a time: one is copied while the other is computed."""

MOST_SHAPES = 16
MOST_BYTES = 1 << 28
"""What a runner keeps at most: combinations of input shapes, and bytes on the device."""

CAPTURING_RUNS = 3
"""onnxruntime runs a graph twice to allocate what it needs, and captures it in the third run."""

_GRAPH = "gpu_graph_id"
_NO_GRAPH = "-1"

Shapes = tuple[tuple[int, ...], ...]
"""The shape of every input, in the order of the signature."""


class Gate:
    """Lets many in, or one alone; who wants to be alone goes before those who come later.

    CUDA allows no copy and no allocation by any thread of the process while a graph is being captured.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._is_closed = False

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Be inside, maybe with others."""
        with self._changed:
            self._changed.wait_for(lambda: not self._is_closed)
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Be inside with nobody else; whoever calls must not be inside."""
        with self._changed:
            self._changed.wait_for(lambda: not self._is_closed)
            self._is_closed = True
            self._changed.wait_for(lambda: self._inside == 0)
        try:
            yield
        finally:
            with self._changed:
                self._is_closed = False
                self._changed.notify_all()


_CAPTURES = Gate()  # of the process, as CUDA's rule is


def bind(session: Any, signature: Signature, device: Device, config: Mapping[str, str]) -> Any:
    """Return what runs a session in the best way for its device: the session itself, or a ``BoundSession``.

    Args:
        session: onnxruntime's.
        signature: Its signature.
        device: Where it runs.
        config: Its session entries.

    Raises:
        ArtifactError: If the entry ``GRAPH_ROWS`` is no list of numbers.
    """
    if device.kind == "cpu" or any(spec.datatype == "BYTES" for spec in (*signature.inputs, *signature.outputs)):
        return session
    rows = graph_rows_of(config) if device.kind == "cuda" else frozenset()
    return BoundSession(session, signature, memory_of(device), rows)


def graph_rows_of(config: Mapping[str, str]) -> frozenset[int]:
    """Return the batch sizes for which CUDA graphs are wanted.

    Raises:
        ArtifactError: If the entry ``GRAPH_ROWS`` is no list of numbers.
    """
    text = config.get(GRAPH_ROWS, "")
    sizes = text.split(",") if text else []
    if not all(size.strip().isdecimal() for size in sizes):
        raise ArtifactError(f"{GRAPH_ROWS} is {text!r}; it must be batch sizes separated by commas, such as '1,8,32'")
    return frozenset(map(int, sizes))


class BoundSession:
    """Runs an onnxruntime session with bound buffers; takes the place of the session where it is run.

    ``run`` may be called from several threads; ``RUNNERS`` of them run at a time, the others wait. With CUDA graphs the
    copies overlap, but all runs compute in one thread of the session's own: onnxruntime keeps graphs per thread.

    Args:
        session: onnxruntime's.
        signature: Of the session; without ``BYTES`` tensors.
        memory: Where bound tensors lie.
        graph_rows: Sizes of axis 0 of the first input for which CUDA graphs are captured.
    """

    def __init__(
        self, session: Any, signature: Signature, memory: Memory, graph_rows: frozenset[int] = frozenset()
    ) -> None:
        self._session, self._signature = session, signature
        self._output_names = frozenset(spec.name for spec in signature.outputs)
        self._graphs = _Graphs(graph_rows)
        self._errors = ort_errors()
        self._idle: LifoQueue[_Runner] = LifoQueue()  # the last one first: its buffers are in use anyway
        for _ in range(RUNNERS):
            self._idle.put(_Runner(session, signature, memory, self._graphs))

    def run(self, names: Sequence[str], inputs: Tensors) -> list[Array]:
        """Run the model.

        Inputs that do not fit the signature go to onnxruntime as they are, for its error.

        Args:
            names: The wanted outputs.
            inputs: Name -> array; not written to and not kept.

        Returns:
            One array per name; they own their memory.
        """
        try:
            self._signature.check(inputs)
        except SignatureMismatch:
            return self._plain(names, inputs)
        shapes = tuple(inputs[spec.name].shape for spec in self._signature.inputs)
        if not self._output_names.issuperset(names) or any(0 in shape for shape in shapes):
            return self._plain(names, inputs)
        runner = self._idle.get()
        try:
            try:
                return runner.run(shapes, names, inputs)
            except self._errors as exc:
                failure = str(exc)  # not the exception, whose traceback holds buffers
            # Memory was too short, the input is bad, or the output is not of the size that the model declares.
            runner.release()
            answers = self._plain(names, inputs)
            logger.warning("a bound run failed where a plain one, which is slower, did not: %s", failure)
            declared = _output_shapes(self._signature, shapes)
            if any(declared[name] != answer.shape for name, answer in zip(names, answers, strict=True)):
                runner.fixes_outputs = False
            return answers
        finally:
            self._idle.put(runner)

    def get_provider_graph_assignment_info(self) -> Any:
        """Return which nodes run where, as onnxruntime's session does."""
        return self._session.get_provider_graph_assignment_info()

    def _plain(self, names: Sequence[str], inputs: Tensors) -> list[Array]:
        with _CAPTURES.shared():
            answers: list[Array] = self._graphs.compute(self._session.run, list(names), inputs, _run_options(_NO_GRAPH))
        return answers


class _Graphs:
    """Which batch sizes are captured, and where they compute.

    Attributes:
        rows: The batch sizes; none after a capture failed.
        ids: Identities of graphs, each for one set of addresses.
    """

    def __init__(self, rows: frozenset[int]) -> None:
        self.rows = rows
        self.ids = count(1)
        self._thread = ThreadPoolExecutor(1, "cuda-graphs") if rows else None

    def compute(self, run: Callable[..., Any], *args: Any) -> Any:
        """Call in the thread of the graphs, or in this one when there are none."""
        return self._thread.submit(run, *args).result() if self._thread is not None else run(*args)


class _Bound:
    """Buffers for one combination of input shapes."""

    def __init__(self, session: Any, signature: Signature, shapes: Shapes, memory: Memory) -> None:
        self.binding = session.io_binding()
        self.options = _run_options(_NO_GRAPH)
        self.is_fixed = self.has_graph = False
        self.inputs = {
            spec.name: memory.tensor(spec, shape) for spec, shape in zip(signature.inputs, shapes, strict=True)
        }
        for name, tensor in self.inputs.items():
            self.binding.bind_ortvalue_input(name, tensor)
        self.n_bytes = sum(tensor.tensor_size_in_bytes() for tensor in self.inputs.values())

    def free_outputs(self, signature: Signature, memory: Memory) -> None:
        """Let the next run allocate its outputs on the device; until then they stay where the last run put them."""
        for spec in signature.outputs:
            self.binding.bind_output(spec.name, memory.kind, memory.index)


class _Runner:
    """Buffers that one run uses at a time; a combination of shapes that was not used for long loses its buffers."""

    def __init__(self, session: Any, signature: Signature, memory: Memory, graphs: _Graphs) -> None:
        self.fixes_outputs = True
        self._session, self._signature, self._memory, self._graphs = session, signature, memory, graphs
        self._staging = Staging(memory)
        self._errors = ort_errors()
        self._bound: OrderedDict[Shapes, _Bound] = OrderedDict()

    def run(self, shapes: Shapes, names: Sequence[str], inputs: Tensors) -> list[Array]:
        """Copy in, run, copy out. After a failure the buffers of these shapes are gone."""
        bound = self._bound.pop(shapes, None) or _Bound(self._session, self._signature, shapes, self._memory)
        if not (bound.is_fixed and self.fixes_outputs):
            bound.free_outputs(self._signature, self._memory)
        with _CAPTURES.shared():
            for name, tensor in bound.inputs.items():
                tensor.update_inplace(self._staging.filled(inputs[name]))
            self._graphs.compute(self._session.run_with_iobinding, bound.binding, bound.options)
            tensors = bound.binding.get_outputs()
            outputs = dict(zip((spec.name for spec in self._signature.outputs), tensors, strict=True))
            answers = [_owned(outputs[name].numpy()) for name in names]
        if not bound.is_fixed and self.fixes_outputs:
            self._fix(bound, shapes, tensors)
        self._bound[shapes] = bound
        self._evict(MOST_BYTES)
        return answers

    def release(self) -> None:
        """Give up all buffers but those of graphs."""
        self._evict(0)

    def _fix(self, bound: _Bound, shapes: Shapes, outputs: Sequence[Any]) -> None:
        """Keep the outputs where they are if their sizes follow from those of the inputs; maybe capture a graph."""
        declared = _output_shapes(self._signature, shapes).values()
        if [tuple(output.shape()) for output in outputs] != list(declared):
            return
        bound.is_fixed = True
        bound.n_bytes += sum(output.tensor_size_in_bytes() for output in outputs)
        captured = sum(other.n_bytes for other in self._bound.values() if other.has_graph)
        rows = shapes[0][0] if shapes and shapes[0] else 0
        if rows in self._graphs.rows and captured + bound.n_bytes <= MOST_BYTES:
            self._capture(bound)

    def _capture(self, bound: _Bound) -> None:
        """Run until onnxruntime has captured the graph: later runs only replay it, so they disturb nobody."""
        options = _run_options(str(next(self._graphs.ids)))
        try:
            with _CAPTURES.alone():
                for _ in range(CAPTURING_RUNS):
                    self._graphs.compute(self._session.run_with_iobinding, bound.binding, options)
        except self._errors as exc:
            self._graphs.rows = frozenset()
            logger.warning("a CUDA graph cannot be captured, this session goes without: %s", exc)
        else:
            bound.has_graph, bound.options = True, options

    def _evict(self, most_bytes: int) -> None:
        # onnxruntime keeps captured graphs, which read and write their buffers, as long as the session is open.
        passing = [shapes for shapes, bound in self._bound.items() if not bound.has_graph]
        n_bytes = sum(bound.n_bytes for bound in self._bound.values())
        while passing and (len(passing) > MOST_SHAPES or n_bytes > most_bytes):
            n_bytes -= self._bound.pop(passing.pop(0)).n_bytes


def _output_shapes(signature: Signature, shapes: Shapes) -> dict[str, tuple[Dimension, ...]]:
    """Return output -> shape as declared, with a size for every axis whose name an input has."""
    sizes: dict[Dimension, int] = {}
    for spec, shape in zip(signature.inputs, shapes, strict=True):
        sizes |= {name: size for name, size in zip(spec.shape, shape, strict=True) if isinstance(name, str)}
    return {spec.name: tuple(sizes.get(size, size) for size in spec.shape) for spec in signature.outputs}


def _run_options(graph: str) -> Any:
    options = onnxruntime.RunOptions()
    options.add_run_config_entry(_GRAPH, graph)
    return options


def _owned(array: Array) -> Array:
    """Return an array that shares no memory with the tensor; onnxruntime copies from a GPU, but not from the CPU."""
    return array if array.flags.owndata else array.copy()
