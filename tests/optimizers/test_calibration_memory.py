"""Peak memory of static calibration must not grow with the number of samples."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.optimizers.graphs import NODE, model_of, normal

FEW, MANY = 64, 1024
SHAPE = (3, 64, 64)

CHILD = """
import sys
from pathlib import Path
import onnx
from optimizers.calibration import read_samples, split
from optimizers.graph import signature_of
from optimizers.passes import PassContext
from optimizers.passes.int8_static import Int8Static
from server.host import read_host

folder, data, method = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
model = onnx.load(folder / "model.onnx")
place = folder / f"{data.stem}-{method}"
place.mkdir()
samples = read_samples(data, signature_of(model), None, place)
batches = samples.take(range(samples.count)[::-1]).batches(8)
result = Int8Static(method=method).run(model, PassContext(read_host(), batches, 0, place))
assert result.counts["quantized"] == 2, result
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM:"))
print(int(peak.split()[1]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("memory")
    nodes = [
        NODE("Conv", ["x", "v"], ["a"], name="first", strides=[2, 2]),
        NODE("Relu", ["a"], ["b"], name="relu"),
        NODE("Conv", ["b", "w"], ["c"], name="second", strides=[2, 2]),
        NODE("GlobalAveragePool", ["c"], ["y"], name="pool"),
    ]
    weights = {"v": normal(8, 3, 3, 3, scale=0.3), "w": normal(8, 8, 3, 3, scale=0.3)}
    onnx.save(model_of(nodes, {"x": ["n", *SHAPE]}, {"y": ["n", 8, 1, 1]}, weights), place / "model.onnx")
    for count in (FEW, MANY):
        np.savez(place / f"{count}.npz", x=normal(count, *SHAPE))
    return place


def peak_kib(folder: Path, count: int, method: str) -> int:
    # ru_maxrss would be at least that of the parent, for it survives exec; the address space of VmHWM is the child's.
    command = [sys.executable, "-c", CHILD, str(folder), str(folder / f"{count}.npz"), method]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.parametrize("method", ["minmax", "entropy"])
def test_sixteen_times_the_samples_take_no_more_memory(folder: Path, method: str) -> None:
    few, many = (peak_kib(folder, count, method) for count in (FEW, MANY))
    assert abs(many - few) < 0.1 * few
