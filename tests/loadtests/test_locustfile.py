"""Locust with this project's load test against a real server: shapes, mixes, workers, verdicts."""

import json
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.end_to_end.process import ROOT, Server

TIMEOUT_S = 90.0
SHORT = ("--warm-up", "0", "--bodies", "2")


def command(*options: str) -> list[str]:
    return [sys.executable, "-m", "locust", "-f", str(ROOT / "loadtests" / "locustfile.py"), *options]


class Outcome(NamedTuple):
    """Exit code, what it said, its result, and the file of its plot."""

    code: int
    said: str
    result: dict[str, Any]
    plot: Path


def locust(server: Server, out: Path, *options: str) -> Outcome:
    """Run a load test."""
    done = subprocess.run(
        command("--headless", "--only-summary", "-H", server.url, "--out", str(out), *SHORT, *options),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
        cwd=ROOT,
    )
    file = out.with_name(f"{out.name}.json")
    result = json.loads(file.read_text()) if file.exists() else {}
    return Outcome(done.returncode, done.stdout + done.stderr, result, out.with_name(f"{out.name}.svg"))


SHAPES = {
    "closed-loop": ("-u", "2", "-t", "1s"),
    "arrival-rate": ("--rate", "40", "-t", "2s"),
    "steps": ("--rate", "20", "--step-seconds", "1", "-t", "2s"),
    "spike": ("--rate", "20", "--factor", "3", "-t", "4s"),
    "soak": ("--rate", "20", "-t", "2s"),
}


LIMITS_MS = {"mlp": "2000", "slow": "2"}


@pytest.fixture(scope="module")
def runs(server: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Outcome]:
    """Each shape on the quick and on the slow model, a few at a time: they wait for the clock most of it."""
    out = tmp_path_factory.mktemp("runs")

    def run(shape: str, model: str) -> Outcome:
        options = ("--model", model, "--shape", shape, "--max-p99-ms", LIMITS_MS[model], *SHAPES[shape])
        return locust(server, out / f"{shape}-{model}", *options)

    with ThreadPoolExecutor(max_workers=4) as pool:
        begun = {(shape, model): pool.submit(run, shape, model) for shape in SHAPES for model in LIMITS_MS}
    return {key: future.result() for key, future in begun.items()}


@pytest.mark.parametrize("shape", SHAPES)
def test_each_shape_passes_on_a_quick_model(runs: dict[tuple[str, str], Outcome], shape: str):
    code, said, result, plot = runs[shape, "mlp"]
    assert code == 0, said
    assert "PASSED: every threshold is kept" in said
    assert "1 process, the busiest took" in said
    assert all(phase["good_per_s"] > 2 for phase in result["phases"])
    assert plot.stat().st_size > 5000


@pytest.mark.parametrize("shape", SHAPES)
def test_each_shape_fails_on_a_slow_model(runs: dict[tuple[str, str], Outcome], shape: str):
    code, said, result, _ = runs[shape, "slow"]
    assert code == 1, said
    assert any("p99 is" in text for text in result["missed"])
    assert not any("no request was answered" in text for text in result["missed"])


def test_rates_are_kept(server: Server, tmp_path: Path):
    code, said, result, _ = locust(server, tmp_path / "run", "--model", "mlp", "--rate", "100", "-t", "3s")
    assert code == 0, said
    assert 75 < result["phases"][0]["asked_per_s"] < 125


def test_steps_end_at_saturation_and_say_what_holds(server: Server, tmp_path: Path):
    code, said, result, _ = locust(
        server, tmp_path / "run", "--model", "slow", "--shape", "steps", "--rate", "4", "--factor", "4",
        "--step-seconds", "1", "--timeout-ms", "500", "--max-p99-ms", "5000", "--max-refused-share", "0.1",
    )  # fmt: skip
    assert code == 0, said
    steps = result["phases"]
    assert len(steps) < 10
    assert steps[-1]["good_per_s"] < 0.9 * steps[-1]["asked_per_s"]
    assert sum(step["refused_429"] + step["expired_504"] for step in steps) > 0
    assert "the objective holds up to" in result["findings"][0]


def test_refusals_are_no_errors_but_have_a_limit(server: Server, tmp_path: Path):
    load = ("--model", "slow", "--rate", "300", "-t", "2s", "--timeout-ms", "200")
    code, said, result, _ = locust(server, tmp_path / "run", *load)
    assert code == 1, said
    (missed,) = result["missed"]
    assert "refused share is" in missed
    code, said, result, _ = locust(server, tmp_path / "run", *load, "--max-refused-share", "1")
    assert (code, result["missed"]) == (0, []), said


def test_least_goodput_can_be_missed(server: Server, tmp_path: Path):
    code, said, *_ = locust(
        server, tmp_path / "run", "--model", "mlp", "--rate", "20", "-t", "1s", "--min-goodput", "9999"
    )
    assert code == 1
    assert "wanted are 9999" in said


def test_a_mix_is_counted_by_kind(server: Server, tmp_path: Path):
    mix = tmp_path / "mix.toml"
    mix.write_text(
        '[[request]]\nmodel = "mlp"\nweight = 3\n'
        '[[request]]\nmodel = "two_inputs"\nname = "two"\nwire = "json"\nrows = 4\npriority = 9\ntimeout_ms = 3000\n'
    )
    code, said, result, _ = locust(server, tmp_path / "run", "--mix", str(mix), "--rate", "100", "-t", "3s")
    assert code == 0, said
    first, second = result["kinds"]
    assert (first["name"], second["name"]) == ("mlp: 1 row, binary", "two")
    assert 1.8 < first["answered_per_s"] / second["answered_per_s"] < 5


def test_two_workers_share_the_rate_and_report_everything(server: Server, tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    workers = [
        subprocess.Popen(
            command("--worker", "--master-port", port), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=ROOT
        )
        for _ in range(2)
    ]
    try:
        code, said, result, _ = locust(
            server, tmp_path / "run", "--model", "mlp", "--rate", "100", "-t", "4s",
            "--master", "--master-bind-port", port, "--expect-workers", "2",
        )  # fmt: skip
        ends = [worker.wait(TIMEOUT_S) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
    assert code == 0, said
    assert ends == [0, 0]
    assert len(result["generator_cpu"]) == 2
    (phase,) = result["phases"]
    assert 75 < phase["asked_per_s"] < 125
    assert phase["answered_per_s"] == phase["asked_per_s"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ((), "--model"),
        (("--model", "nothing"), "answers with 404"),
        (("--model", "mlp", "--shape", "spike"), "needs --rate"),
        (("--mix", "missing.toml"), "No such file"),
        (("--model", "mlp", "--rate", "5", "--shape", "closed-loop"), "closed loop has no --rate"),
    ],
)
def test_what_cannot_start_says_why(server: Server, tmp_path: Path, options: tuple[str, ...], text: str):
    code, said, *_ = locust(server, tmp_path / "run", "-t", "1s", *options)
    assert code != 0
    assert f"cannot start: {text}" in said or ("cannot start: " in said and text in said)
    assert "Traceback" not in said
