"""``slipstream plan`` on real artifacts."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from server.artifact import LatencyTable
from server.planning import plan
from tests.artifacts import write_artifact, write_plain


def table(one_ms: float, eight_ms: float) -> LatencyTable:
    return LatencyTable((1, 8), *[(one_ms, eight_ms)] * 4)


@pytest.fixture
def version(tmp_path: Path, mlp: Path) -> Path:
    tables = {"fast": table(10.0, 40.0), "slow": table(20.0, 160.0)}
    return write_artifact(tmp_path / "models", "mlp", "1", {"fast": mlp, "slow": mlp}, latency=tables)


def ask(version: Path, *options: str) -> Result:
    return CliRunner().invoke(plan, [str(version), "--rps", "500", "--slo-ms", "100", "--cores", "2", *options])


def figures(version: Path, *options: str) -> dict:
    result = ask(version, "--json", *options)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_replicas_serve_the_load_with_headroom_and_spares(version: Path):
    answer = figures(version, "--headroom", "0.5", "--spare", "2", "--lanes", "1")
    assert (answer["model"], answer["variant"], answer["lanes"]) == ("mlp/1", "fast", 1)
    assert 100 < answer["capacity_per_s"] < 200
    assert answer["planned_per_s"] == pytest.approx(answer["capacity_per_s"] / 2)
    assert answer["replicas"] == -(-500 // answer["planned_per_s"]) + 2


def test_more_lanes_need_fewer_replicas(version: Path):
    assert figures(version, "--lanes", "4")["replicas"] < figures(version, "--lanes", "1")["replicas"]
    assert figures(version, "--cores", "6")["lanes"] == 3 * figures(version, "--cores", "2")["lanes"]


def test_a_variant_can_be_chosen(version: Path):
    slow, fast = figures(version, "--variant", "slow"), figures(version)
    assert slow["variant"] == "slow"
    assert slow["capacity_per_s"] < 0.6 * fast["capacity_per_s"]


def test_the_table_shows_both_sides_of_the_capacity(version: Path):
    text = ask(version).stdout
    assert "one replica keeps a p99 of 100 ms up to" in text
    assert "500 requests/s need" in text
    curve = figures(version)["curve"]
    assert curve[-2]["p99_s"] <= 0.1 < curve[-1]["p99_s"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--slo-ms", "5"), "no number of replicas keeps 5 ms"),
        (("--variant", "none"), "no variant 'none' with a latency table; it has fast, slow"),
        (("--rps", "0"), "0.0 is not in the range"),
    ],
)
def test_what_cannot_be_planned_says_why(version: Path, options: tuple[str, ...], text: str):
    result = ask(version, *options)
    assert result.exit_code != 0
    assert text in result.stderr
    assert "Traceback" not in result.output


def test_unmeasured_and_missing_models_say_how_to_measure(tmp_path: Path, mlp: Path):
    plain = write_plain(tmp_path / "models", "plain", "1", mlp)
    folder = plain if plain.is_dir() else plain.parent
    assert "has no latency table; make one on the host that serves" in ask(folder).stderr
    assert "holds neither manifest.json nor model.onnx" in ask(tmp_path / "none" / "1").stderr
