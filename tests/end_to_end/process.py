"""A real server process, started through the command line, that says when it is ready."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType

import httpx

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 60.0


class Server:
    """A ``slipstream serve`` process on a free port. A context manager that kills what is still running.

    Args:
        repository: What it serves, a folder of models or a model file.
        options: Further options of the command.
        wait: Whether to wait until it is ready, or has loaded what it can; ``url`` and ``port`` are known only then.
        folder: Where it runs.
    """

    def __init__(self, repository: Path, *options: str, wait: bool = True, folder: Path = ROOT) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SLIPSTREAM_")}
        self.process = subprocess.Popen(
            [
                sys.executable,
                ROOT / "slipstream.py",
                "serve",
                repository,
                "--port",
                "0",
                "--log-format",
                "json",
                *options,
            ],
            cwd=folder,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.log: list[str] = []
        self._client = httpx.Client(timeout=TIMEOUT_S)
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if wait:
            try:
                self._wait_until_it_serves()
            except BaseException:
                self.close()
                raise

    def wait_for(self, text: str) -> str:
        """Return the first message from here on that contains ``text``; fail if the process ends without it."""
        while (line := self._lines.get(timeout=TIMEOUT_S)) is not None:
            try:
                message = str(json.loads(line)["message"])
            except ValueError:
                message = line
            if text in message:
                return message
        raise AssertionError(f"the server ended without {text!r}:\n{self.text}")

    @property
    def text(self) -> str:
        """Everything on stderr so far."""
        return "".join(self.log)

    def terminate(self, sig: int = signal.SIGTERM) -> None:
        """Send a signal."""
        self.process.send_signal(sig)

    def wait(self) -> int:
        """Wait for the end and return the exit code."""
        code = self.process.wait(TIMEOUT_S)
        self._reader.join(TIMEOUT_S)
        return code

    def metric(self, name: str, **labels: str) -> float:
        """Return one sample of ``/metrics``, 0 when there is none."""
        for line in self._client.get(f"{self.url}/metrics").text.splitlines():
            sample, _, value = line.rpartition(" ")
            if sample.split("{")[0] == name and all(f'{key}="{label}"' in sample for key, label in labels.items()):
                return float(value)
        return 0.0

    def wait_for_metric(self, at_least: float, name: str, **labels: str) -> None:
        """Ask for a metric until it reaches a value."""
        for _ in range(20_000):
            if self.metric(name, **labels) >= at_least:
                return
        raise AssertionError(f"{name} {labels} never reached {at_least}")

    def close(self) -> None:
        """Kill the process if it still runs."""
        self._client.close()
        self.process.kill()
        self.process.wait(TIMEOUT_S)
        self._reader.join(TIMEOUT_S)
        if self.process.stderr is not None:
            self.process.stderr.close()

    def __enter__(self) -> "Server":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _wait_until_it_serves(self) -> None:
        self.url = self.wait_for("listening on ").split("listening on ")[1].split(",")[0]
        self.port = int(self.url.rsplit(":", 1)[1])
        self.wait_for(f"on {self.url}")

    def _read(self) -> None:
        if self.process.stderr is not None:
            for line in self.process.stderr:
                self.log.append(line)
                self._lines.put(line)
        self._lines.put(None)
