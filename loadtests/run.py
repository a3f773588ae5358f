"""``make loadtest``: serve the models of the folder ``models`` and run Locust against them, once for each shape.

``--scenario NAME``, which may be repeated, runs only some. All other arguments are passed on to Locust and win over the
ones given here, e.g. ``--model magika -t 60s``.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from benchmarks.servers import HOST, RunningServer, ServerFailed, slipstream

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "loadtests" / "results"
# 64 tokens per text. The bounds are wide: they catch a server that queues without limit or answers wrongly, on any
# machine. INT8 answers move with the batch, so the tolerance is that of a rough comparison.
COMMON = "--model minilm-l6 --variable-size 64 --tolerance 0.5"
SCENARIOS = {
    "closed-loop": "-u 16 -t 15s --max-p99-ms 2000",
    "arrival-rate": "--rate 20 -t 15s --max-p99-ms 1000",
    "steps": "--shape steps --rate 15 --timeout-ms 200 --max-p99-ms 400",
    "spike": "--shape spike --rate 20 --factor 25 -t 20s --timeout-ms 500 --max-p99-ms 1000",
    "soak": "--shape soak --rate 20 -t 30s --max-p99-ms 1000",
    "mixed": "--mix loadtests/mixed.toml --rate 20 -t 15s --max-p99-ms 1000",
}


def main() -> int:
    """Run the scenarios; return 1 if one misses its objective."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.run", description=__doc__)
    parser.add_argument(
        "--scenario", action="append", choices=list(SCENARIOS), help="Run only this one; may be repeated."
    )
    chosen, extra = parser.parse_known_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    try:
        with slipstream(ROOT / "models") as server:
            names = chosen.scenario or SCENARIOS
            failed = [name for name in names if run_scenario(name, server, extra) != 0]
    except ServerFailed as exc:
        sys.stderr.write(f"Error: {exc}\n")
        return 1
    print(f"\nresults are in {RESULTS}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


def run_scenario(name: str, server: RunningServer, extra: list[str]) -> int:
    """Run Locust without a browser page; return its exit code."""
    print(f"\n== {name}", flush=True)
    prefix = str(RESULTS / name)
    command = [sys.executable, "-m", "locust", "-f", str(ROOT / "loadtests" / "locustfile.py"), "--headless"]
    command += ["--only-summary", "-H", f"http://{HOST}:{server.port}"]
    command += ["--out", prefix, "--csv", prefix, "--html", f"{prefix}.html"]
    command += [*COMMON.split(), *SCENARIOS[name].split(), *extra]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
