"""The error of INT8 products on this CPU, with 8-bit and 7-bit weights, without and with exact products asked for.

On a CPU with an INT8 dot product all four are small. An emulated CPU without one shows the trap::

    qemu-x86_64 -cpu Haswell .venv/bin/python -m benchmarks.saturation
"""

import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from optimizers.passes import PassContext
from optimizers.passes.check import answers
from optimizers.passes.int8_dynamic import Int8Dynamic
from optimizers.passes.int8_static import Int8Static
from server.artifact import SessionOptions
from server.host import HostFacts
from server.providers import EXACT_PRODUCTS

DEPTH, WIDTH, ROWS = 512, 32, 16
HOSTS = {"8-bit weights": HostFacts("", ("avx512_vnni",), 1), "7-bit weights": HostFacts("", ("avx2",), 1)}


def adversarial() -> onnx.ModelProto:
    """Build one MatMul whose large weights, mostly of one sign, meet large activations."""
    signs = np.where(np.random.default_rng(0).random((DEPTH, WIDTH)) < 0.9, 1, -1).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="m")],
        "adversarial",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", DEPTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", WIDTH])],
        [numpy_helper.from_array(signs, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def main() -> None:
    """Print a table of the largest relative errors."""
    model = adversarial()
    batch = {"x": np.random.default_rng(1).uniform(0.9, 1, (ROWS, DEPTH)).astype(np.float32)}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        expected = answers(model, [batch], work)[0]["y"]
        for weights, host in HOSTS.items():
            for step in (Int8Dynamic(), Int8Static()):
                result = step.run(model, PassContext(host, (batch,), 0, work)).model
                for exact in ("0", "1"):
                    options = SessionOptions(config={EXACT_PRODUCTS: exact})
                    seen = answers(result, [batch], work, options)[0]["y"]
                    error = np.abs(seen - expected).max() / np.abs(expected).max()
                    asked = "exact products" if exact == "1" else "as it comes"
                    print(f"{step.name:<13} {weights}  {asked:<15} {error:8.2%}")


if __name__ == "__main__":
    main()
