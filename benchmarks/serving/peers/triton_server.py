"""Triton: the server that nvidia-pytriton carries, its Python backend with an instance per core, its dynamic batcher.

There is no ONNX Runtime backend in that package. Requests may carry a timeout, which the queue keeps.
"""

import os
import shutil
import sys
import sysconfig
from pathlib import Path

from benchmarks.serving.peers.setup import Setup, open_session, read_setup

PATIENT_S = 60
TYPES = {"tensor(float)": "TYPE_FP32", "tensor(int64)": "TYPE_INT64", "tensor(int32)": "TYPE_INT32"}


def config_of(setup: Setup) -> str:
    """Return the model's ``config.pbtxt``."""
    session = open_session(setup.model, 1)
    tensors = []
    for kind, nodes in (("input", session.get_inputs()), ("output", session.get_outputs())):
        for node in nodes:
            sizes = ", ".join(str(size if isinstance(size, int) else -1) for size in node.shape[1:])
            tensors.append(f'{kind} [ {{ name: "{node.name}" data_type: {TYPES[node.type]} dims: [ {sizes} ] }} ]')
    return "\n".join(
        [
            f'name: "{setup.name}"',
            'backend: "python"',
            f"max_batch_size: {setup.max_rows}",
            *tensors,
            f"instance_group [ {{ count: {setup.instances} kind: KIND_CPU }} ]",
            "dynamic_batching {",
            f"  max_queue_delay_microseconds: {round(setup.window_ms * 1e3)}",
            # A request's own timeout counts only where it is below the default, which is none.
            "  default_queue_policy { timeout_action: REJECT allow_timeout_override: true "
            f"default_timeout_microseconds: {PATIENT_S * 1_000_000} }}",
            "}",
            f'parameters [ {{ key: "model" value: {{ string_value: "{setup.model}" }} }},',
            f'             {{ key: "threads" value: {{ string_value: "{setup.threads}" }} }} ]',
        ]
    )


def backends_of(triton: Path, folder: Path) -> Path:
    """Copy the Python backend together with its stub for this Python."""
    backends = folder / "backends"
    shutil.copytree(triton / "backends" / "python", backends / "python")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = triton / "python_backend_stubs" / version / "triton_python_backend_stub"
    shutil.copy(stub, backends / "python")
    return backends


def main() -> None:
    """Write the repository, then become the server."""
    setup = read_setup()
    packages = Path(sysconfig.get_path("purelib"))
    triton = packages / "pytriton" / "tritonserver"
    version = setup.workspace / "repository" / setup.name / "1"
    version.mkdir(parents=True)
    (version.parent / "config.pbtxt").write_text(config_of(setup), encoding="utf-8")
    shutil.copy(Path(__file__).with_name("triton_model.py"), version / "model.py")
    # The stub takes the environment whose bin is first, and needs the library of the same Python.
    libraries = [sysconfig.get_config_var("LIBDIR"), str(packages / "nvidia_pytriton.libs")]
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": ":".join(libraries),
    }
    command = [
        str(triton / "bin" / "tritonserver"),
        f"--model-repository={version.parents[1]}",
        f"--backend-directory={backends_of(triton, setup.workspace)}",
        f"--backend-config=python,shm-region-prefix-name={setup.workspace.name}",
        "--http-address=127.0.0.1",
        f"--http-port={setup.port}",
        "--allow-grpc=false",
        "--allow-metrics=false",
        "--exit-timeout-secs=3",
    ]
    os.execve(command[0], command, environment)


if __name__ == "__main__":
    main()
