"""onnxruntime's own recipe for INT8 on a CPU: pre-process, then quantize as its documentation advises.

Dynamic quantization for transformers and dense models, static QDQ with ``MinMax`` ranges, per channel, UINT8
activations and INT8 weights for convolutions; 7-bit weights where the CPU lacks a dot product (VNNI).

Source: onnxruntime documentation, *Quantize ONNX models*: *Pre-processing*, *Method selection*, *Data type selection*.
"""

import contextlib
from pathlib import Path
from typing import Any

from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from benchmarks.peers.protocol import feeds_of, is_convolutional, serve


class Feeds(CalibrationDataReader):  # type: ignore[misc]
    """The samples, one by one."""

    def __init__(self, model: str, data: str) -> None:
        self._left = iter(feeds_of(model, data))

    def get_next(self) -> dict[str, Any] | None:
        return next(self._left, None)


def quantized(request: dict[str, Any]) -> dict[str, Any]:
    """Follow the recipe; see ``protocol.serve``."""
    output = Path(request["output"])
    prepared, made = output / "prepared.onnx", output / "model.onnx"
    notes = [_prepare(Path(request["model"]), prepared)]
    reduce_range = not request["int8_dot"]
    if is_convolutional(request["model"]):
        notes.append("quantize_static: QDQ, MinMax, per channel, U8S8")
        quantize_static(
            prepared,
            made,
            Feeds(request["model"], request["data"]),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=reduce_range,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    else:
        notes.append("quantize_dynamic: INT8 weights")
        quantize_dynamic(prepared, made, weight_type=QuantType.QInt8, reduce_range=reduce_range)
    return {"model": str(made), "session": {}, "notes": [*(note for note in notes if note), *_reduced(reduce_range)]}


def _prepare(model: Path, prepared: Path) -> str:
    """Infer shapes and optimize; without symbolic shapes where these cannot be inferred, as the documentation says."""
    with contextlib.chdir(prepared.parent):  # the symbolic inference drops files where it fails
        try:
            quant_pre_process(model, prepared)
        except Exception as exc:  # noqa: BLE001  (it raises plain Exception)
            quant_pre_process(model, prepared, skip_symbolic_shape=True)
            return f"pre-processed without symbolic shapes ({type(exc).__name__}: {str(exc)[:80]})"
    return ""


def _reduced(reduce_range: bool) -> list[str]:
    return ["7-bit weights"] if reduce_range else []


if __name__ == "__main__":
    serve(quantized)
