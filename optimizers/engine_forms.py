"""The INT8 form that TensorRT's engines are made of, proven on the CPU before there is an engine.

TensorRT takes symmetric ranges only, which no kernel of a CPU computes fast. So this form is not raced with the others.
It is examined as it is written, every tensor rounded to 8 bits and multiplied in float: what an engine computes in
INT8, but for the order of its sums. The server checks the engine itself against the golden outputs before it serves.
"""

import msgspec

from optimizers.building import Built, Line
from optimizers.errors import PassFailed
from optimizers.exam import Exam
from optimizers.passes.int8_static import Int8Static
from optimizers.passes.ranges import Method
from optimizers.records import EngineRecord
from optimizers.search import Gate, unfaithful
from server.artifact import Fidelity, SessionOptions
from server.errors import SlipstreamError
from server.providers import CPU
from server.session import Session

NAME = "int8-tensorrt"
AS_WRITTEN = {"session.disable_quant_qdq": "1"}
"""Session entry: compute QuantizeLinear and DequantizeLinear as they stand, without kernels that join them."""

_METHODS: tuple[Method, ...] = ("minmax", "entropy", "percentile", "mse")


class EngineForm(msgspec.Struct, frozen=True):
    """A form that only engines are made of.

    Attributes:
        built: The form.
        options: How it is opened on the CPU, to be proven.
        fidelity: Its evidence on the held-out samples.
    """

    built: Built
    options: SessionOptions
    fidelity: Fidelity


def find_int8(line: Line, exact: Built, exam: Exam, gate: Gate) -> tuple[EngineForm | None, EngineRecord]:
    """Quantize the exact form for TensorRT with one way of choosing ranges after the other, until one is faithful.

    Args:
        line: Runs passes.
        exact: The fused form in full precision.
        exam: The held-out samples.
        gate: What is required.

    Returns:
        The form, ``None`` if none is faithful, and what the report says of it.
    """
    reasons = []
    for method in _METHODS:
        built = line.build(NAME, (*exact.chain, Int8Static(target="tensorrt", method=method)), "int8-static")
        refusal = built.failure
        if not refusal:
            options = msgspec.structs.replace(
                built.options, intra_op_threads=1, spinning=False, config={**built.options.config, **AS_WRITTEN}
            )
            try:
                fidelity = _fidelity(built, options, exam)
            except (PassFailed, SlipstreamError) as exc:
                refusal = str(exc)
            else:
                refusal = unfaithful(fidelity, gate)
            if not refusal:
                facts = {"agreement": f"{fidelity.agreement:.4f}", "ranges": method}
                record = EngineRecord(f"{NAME}: proven", "its engine is built where TensorRT works", facts)
                return EngineForm(built, options, fidelity), record
        reasons.append(f"{method}: {refusal}")
    return None, EngineRecord(f"{NAME}: refused", "; ".join(dict.fromkeys(reasons)))


def _fidelity(built: Built, options: SessionOptions, exam: Exam) -> Fidelity:
    session = Session(built.model, CPU, options)
    try:
        return exam.fidelity(built, session)
    finally:
        session.close()
