"""A run that was killed goes on where it was, and an artifact's recipe makes the same variants again.

The processes here run without a clock: how fast a session is follows from the size of its model, so that two runs
cannot choose differently because of noise. Everything else is as it is.
"""

import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optimizers import pipeline, racing, trial
from optimizers.measurement import Race, RacePlan, Sample
from optimizers.passes.sanitize import Sanitize
from optimizers.passes.simplify import Simplify
from optimizers.records import Report
from optimizers.report import read_report
from server.artifact import Artifact, read_artifact
from server.session import Session
from tests.models import save_mlp

ROOT = Path(__file__).parents[2]
_START = "from tests.optimizers.test_resume import main; main()"


def main() -> None:
    """Run ``slipstream`` without a clock, and with few exact passes to save time; in a process of its own."""
    from slipstream import main as slipstream  # noqa: PLC0415  (not needed by the tests' own process)

    pipeline.EXACT = (Sanitize(), Simplify())
    trial.session_memory = lambda *_: None
    racing.race = timeless
    slipstream()


def timeless(
    sessions: Mapping[str, Session], batches: Mapping[int, Any], _: object, plan: RacePlan, *__: object
) -> Race:
    def sample(session: Session, rows: int, number: int) -> Sample:
        seconds = 1e-9 * rows * session._path.stat().st_size
        return Sample(number, seconds, seconds)

    cells = [(name, rows) for name in sessions for rows in batches]
    return Race(
        {(name, rows): [sample(sessions[name], rows, i) for i in range(plan.least_rounds)] for name, rows in cells}
    )


class Place:
    """A model, its samples, a repository and a cache."""

    def __init__(self, folder: Path, shared: Path) -> None:
        self.repository, self.cache, self.shared = folder / "models", folder / "cache", shared

    def command(self, *options: object) -> list[str]:
        places = ["--repository", self.repository, "--name", "mlp", "--cache", self.cache]
        given = ["optimize", self.shared / "mlp.onnx", "--calibration", self.shared / "data.npz", *places, *options]
        return [sys.executable, "-c", _START, *map(str, given)]

    def run(self, *options: object) -> Artifact:
        done = subprocess.run(self.command(*options), cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return read_artifact(self.repository / "mlp" / "1")

    def kill_at(self, stage: str, *options: object) -> None:
        """Start a run and kill it, with no chance to tidy up, as soon as it reports a stage."""
        with subprocess.Popen(self.command(*options), cwd=ROOT, stdout=2, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            reached = any(stage in line for line in process.stderr)
            process.kill()
        assert reached, f"{stage} was never reported"
        assert process.returncode == -signal.SIGKILL

    def findings(self) -> dict[Path, int]:
        """Return the finished passes and when each was written."""
        return {file: file.stat().st_mtime_ns for file in self.cache.glob("*/*/finding.json")}

    def left_behind(self) -> list[str]:
        return [path.name for folder in (self.repository, self.cache) for path in folder.glob(".*")]


SEARCH = (
    *("--precisions", "fp32,int8", "--compressions", "none", "--devices", "cpu"),
    *("--objective", "size", "--min-agreement", "0.8"),
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    save_mlp(folder / "mlp.onnx", hidden=256)
    np.savez(folder / "data.npz", x=np.random.default_rng(0).standard_normal((240, 64)).astype(np.float32))
    return folder


@pytest.fixture(scope="module")
def whole(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """What a run makes that nobody interrupts."""
    return Place(tmp_path_factory.mktemp("whole"), shared).run(*SEARCH)


def cached(report: Report) -> dict[str, bool]:
    return {record.name: record.cached for record in report.passes}


def test_killed_run_goes_on_where_it_was(whole: Artifact, shared: Path, tmp_path: Path):
    place = Place(tmp_path, shared)
    place.kill_at("explore int8-static", *SEARCH)
    assert any(name.startswith(".optimize-") for name in place.left_behind())
    assert not (place.repository / "mlp").exists()
    finished = place.findings()
    assert len(finished) >= 4, "sanitize, simplify, the build for this CPU, int8-dynamic"

    place.kill_at("latency race", *SEARCH)
    assert not (place.repository / "mlp").exists()
    all_finished = place.findings()
    assert all_finished.items() >= finished.items(), "what was finished before the first kill was not done again"

    artifact = place.run(*SEARCH)
    assert place.findings() == all_finished
    assert place.left_behind() == []
    report, undisturbed = read_report(artifact.folder), read_report(whole.folder)
    assert cached(report) == dict.fromkeys(cached(undisturbed), True)
    assert not any(cached(undisturbed).values())
    assert {"sanitize", "int8-dynamic", "int8-static"} <= cached(report).keys()

    assert artifact.manifest is not None
    assert whole.manifest is not None
    assert artifact.manifest.digest == whole.manifest.digest != ""
    assert artifact.variants == whole.variants
    assert [(step.what, step.outcome) for step in report.steps] == [
        (step.what, step.outcome) for step in undisturbed.steps
    ]


def test_recipe_of_an_artifact_makes_the_same_variants_without_a_search(whole: Artifact, shared: Path, tmp_path: Path):
    assert whole.variants[0].precision.startswith("int8"), "a lossy variant is served"
    replayed = Place(tmp_path, shared).run("--recipe", whole.folder / "recipe.toml")
    served = {variant.name: variant.sha256 for variant in whole.variants}
    assert {variant.name: variant.sha256 for variant in replayed.variants} == served
    report = read_report(replayed.folder)
    assert report.steps == ()
    assert not any(cached(report).values())
