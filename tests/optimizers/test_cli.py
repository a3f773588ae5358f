"""The commands: what goes to stdout and stderr, and the exit codes."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result

from optimizers import pipeline
from optimizers.cli import inspect, optimize, verify
from optimizers.errors import OptimizerError
from tests import models

FAST = ["--precisions", "fp32", "--devices", "cpu", "--time-budget", "0.1"]


def run(command: object, *arguments: object) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Result]:
    """Model, repository, and the result of optimizing it."""
    folder = tmp_path_factory.mktemp("cli")
    model = models.save_mlp(folder / "mlp.onnx")
    result = run(optimize, model, "--repository", folder / "models", "--name", "mlp", *FAST)
    return model, folder / "models", result


@pytest.fixture
def artifact(first: tuple[Path, Path, Result]) -> Path:
    return first[1] / "mlp" / "1"


def test_optimize_ends_with_a_table_the_verdicts_and_where_it_is(first: tuple[Path, Path, Result], artifact: Path):
    result = first[2]
    assert result.exit_code == 0
    assert "original-1thread" in result.stdout
    assert "fp32" in result.stdout
    assert f"written: {artifact}" in result.stdout
    assert f"report: {artifact / 'report.html'}" in result.stdout


def test_optimize_tells_its_stages_on_stderr(first: tuple[Path, Path, Result]):
    lines = first[2].stderr.splitlines()
    assert any("pass sanitize" in line for line in lines)
    assert any("latency race" in line for line in lines)
    assert "latency race" not in first[2].stdout


def test_second_optimize_does_nothing(
    first: tuple[Path, Path, Result], artifact: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pipeline, "optimize", None)
    result = run(optimize, first[0], "--repository", first[1], "--name", "mlp", *FAST)
    assert result.exit_code == 0
    assert f"up to date: {artifact}" in result.stdout


def test_json_prints_one_document(first: tuple[Path, Path, Result], artifact: Path):
    for result in (
        run(optimize, first[0], "--repository", first[1], "--name", "mlp", *FAST, "--json"),
        run(inspect, artifact, "--json"),
    ):
        assert result.exit_code == 0
        assert json.loads(result.stdout)["chosen"] == "fp32"


def test_inspect_says_why_each_candidate_was_kept_or_refused(artifact: Path):
    result = run(inspect, artifact)
    assert result.exit_code == 0
    assert "original-1thread is" in result.stdout


def test_verify_proves_every_variant_again(artifact: Path):
    result = run(verify, artifact)
    assert result.exit_code == 0
    assert "fp32 on cpu" in result.stdout


def damage(artifact: Path, folder: Path) -> Path:
    """Copy an artifact and change a weight, with the manifest's digest in step, as a broken host would compute."""
    copy = folder / "mlp" / "1"
    shutil.copytree(artifact, copy)
    path = copy / "fp32" / "model.onnx"
    model = onnx.load(path)
    tensor = model.graph.initializer[0]
    tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * np.float32(1.2), tensor.name))
    onnx.save(model, path)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["variants"][0]["sha256"] = pipeline.digest_of(path)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


def test_verify_fails_when_a_variant_answers_otherwise(artifact: Path, tmp_path: Path):
    result = run(verify, damage(artifact, tmp_path))
    assert result.exit_code == 1
    assert "FAILED fp32" in result.stdout
    assert "1 of 1 variants failed: fp32" in result.stderr


def test_verify_fails_when_a_file_was_changed(artifact: Path, tmp_path: Path):
    shutil.copytree(artifact, tmp_path / "mlp" / "1")
    (tmp_path / "mlp" / "1" / "fp32" / "model.onnx").write_bytes(b"")
    result = run(verify, tmp_path / "mlp" / "1")
    assert result.exit_code == 1
    assert "SHA-256" in result.stderr


def test_error_is_one_line_without_traceback(tmp_path: Path):
    (tmp_path / "bad.onnx").write_text("not a model")
    result = run(optimize, tmp_path / "bad.onnx", "--repository", tmp_path / "models", "--name", "bad")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "bad.onnx is not an ONNX model" in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_debug_lets_the_error_through(tmp_path: Path):
    (tmp_path / "bad.onnx").write_text("not a model")
    result = run(optimize, tmp_path / "bad.onnx", "--repository", tmp_path, "--name", "bad", "--debug")
    assert isinstance(result.exception, OptimizerError)


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--name", "x"),
        ("--name", "x", "--repository", "r", "--precisions", "int3"),
        ("--name", "x", "--repository", "r", "--devices", ","),
        ("--name", "x", "--repository", "r", "--version", "0"),
        ("--name", "x", "--repository", "r", "--calibration", "missing.npz"),
    ],
)
def test_wrong_usage_exits_with_2(mlp: Path, arguments: tuple[str, ...]):
    result = run(optimize, mlp, *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("Usage:")


def test_labels_without_samples_are_wrong_usage(mlp: Path, tmp_path: Path):
    np.savez(tmp_path / "labels.npz", labels=np.zeros(4, np.int64))
    result = run(optimize, mlp, "--name", "x", "--repository", tmp_path, "--labels", tmp_path / "labels.npz")
    assert result.exit_code == 2
    assert "--labels needs --calibration" in result.stderr


def test_options_out_of_range_are_refused(mlp: Path, tmp_path: Path):
    result = run(optimize, mlp, "--name", "x", "--repository", tmp_path, "--min-agreement", "1.5")
    assert result.exit_code in (1, 2)
    assert "min" in result.stderr
    assert "1.5" in result.stderr


def test_help_teaches_the_formats():
    result = run(optimize, "--help")
    assert result.exit_code == 0
    for word in ("DATA.npz", "LABELS.npz", "slipstream serve", "--min-agreement"):
        assert word in result.stdout
