"""``make loadtest``: serve the models of the folder ``models`` and run Locust against one of them, twice.

Arguments are passed on to Locust and win over the ones given here, e.g. ``--model magika -t 60s``.
"""

import subprocess
import sys
from pathlib import Path

from benchmarks.servers import HOST, RunningServer, ServerFailed, slipstream

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "loadtests" / "results"
# 64 tokens per text. The bounds are wide: they catch a server that queues without limit or answers wrongly, on any
# machine. INT8 answers move with the batch, so the tolerance is that of a rough comparison.
COMMON = ("--model", "minilm-l6", "--variable-size", "64", "--tolerance", "0.25", "-t", "15s")
SCENARIOS = {
    "closed-loop": ("-u", "16", "-r", "16", "--max-p99-ms", "2000"),
    "arrival-rate": ("-u", "64", "-r", "64", "--rate", "20", "--max-p99-ms", "1000"),
}


def main() -> int:
    """Run every scenario; return 1 if one breaks a threshold."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    try:
        with slipstream(ROOT / "models") as server:
            failed = [name for name in SCENARIOS if run_scenario(name, server, sys.argv[1:]) != 0]
    except ServerFailed as exc:
        sys.stderr.write(f"Error: {exc}\n")
        return 1
    print(f"\nresults are in {RESULTS}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


def run_scenario(name: str, server: RunningServer, extra: list[str]) -> int:
    """Run Locust without a browser page; return its exit code."""
    print(f"\n== {name}", flush=True)
    command = [sys.executable, "-m", "locust", "-f", str(ROOT / "loadtests" / "locustfile.py"), "--headless"]
    command += ["--only-summary", "-H", f"http://{HOST}:{server.port}"]
    command += ["--csv", str(RESULTS / name), "--html", str(RESULTS / f"{name}.html")]
    return subprocess.run([*command, *COMMON, *SCENARIOS[name], *extra], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
