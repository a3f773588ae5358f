"""``--workers``: front-end processes for HTTP around one engine process, started, kept alive and stopped in order.

The supervisor binds the socket and serves nothing itself. A front end that dies is replaced; its connections are lost,
those of the others are not. An engine that dies is replaced, and the front ends refuse requests until the next one
answers; only one that dies or finds nothing to serve before it has ever opened its models ends the server.

How it stops, after SIGTERM or SIGINT: all processes are told, and ``ready`` answers 503; every front end goes on to
serve for ``shutdown_grace_s``, closes its socket, and finishes its requests; the engine ends last. A second signal ends
all processes at once. A process whose supervisor is gone ends by itself.
"""

import asyncio
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import Final

from server.channel import channel_pair
from server.errors import StartupError
from server.listener import url_of
from server.orders import Line, Note, Word
from server.settings import Settings, settings_to_text

logger = logging.getLogger(__name__)

# What the processes get to stop beyond the times that they are given, before they are killed.
STOP_MARGIN_S: Final = 10.0
# A process that dies is replaced after this time, doubled for each one in a row that lived only shortly.
FIRST_DELAY_S: Final = 0.1
LAST_DELAY_S: Final = 10.0
SHORT_LIFE_S: Final = 30.0


def require_linux(platform: str = sys.platform) -> None:
    """Check that this system has what several processes need: memory without a name, and sockets that carry it.

    Raises:
        StartupError: If it is not Linux.
    """
    if platform != "linux":
        raise StartupError(f"--workers above 1 needs Linux, this is {platform}; use --workers 1")


class Process:
    """A process of the server, and the line to it. Construct it with ``start``.

    Attributes:
        name: What the log calls it.
        ended: Set when it has ended.
    """

    def __init__(
        self,
        name: str,
        process: asyncio.subprocess.Process,
        connection: socket.socket,
        lost: Callable[["Process"], None] | None,
    ) -> None:
        self.name, self.ended = name, asyncio.Event()
        self.failure: str | None = None
        self._process, self._lost = process, lost
        self._said: dict[Word, asyncio.Event] = {}
        self._line = Line(connection, self._receive, lambda: None)
        self._waiting = asyncio.create_task(self._wait())

    @classmethod
    async def start(cls, name: str, module: str, lost: Callable[["Process"], None] | None = None) -> "Process":
        """Start ``module.main`` in a fresh interpreter, in a session of its own, so that terminals do not signal it.

        Args:
            name: What the log calls it.
            module: Its module.
            lost: Called whenever it reports that its channel is lost.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",
                "-c",
                f"from {module} import main; main({theirs.fileno()})",
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        return cls(name, process, ours, lost)

    def send(self, word: Word, text: str = "", *files: int) -> None:
        """Send an order."""
        self._line.send(word, text, *files)

    async def says(self, word: Word) -> bool:
        """Wait for a report; return whether it came, and not the end of the process."""
        said = self._said.setdefault(word, asyncio.Event())
        waiting = [asyncio.ensure_future(event.wait()) for event in (said, self.ended)]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for future in waiting:
                future.cancel()
        return said.is_set()

    @property
    def is_running(self) -> bool:
        """Whether it has not ended, as far as the line to it tells."""
        return self._process.returncode is None and self._line.is_open

    def kill(self) -> None:
        """End it at once."""
        if self._process.returncode is None:
            self._process.kill()

    def describe_end(self) -> str:
        """Say how it ended."""
        code = self._process.returncode or 0
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    def _receive(self, note: Note, _: list[int]) -> None:
        if note.word == "failed":
            self.failure = note.text
        elif note.word == "lost" and self._lost is not None:
            self._lost(self)
        self._said.setdefault(note.word, asyncio.Event()).set()

    async def _wait(self) -> None:
        await self._process.wait()
        self._line.close()
        self.ended.set()


class Supervisor:
    """Runs the server in several processes.

    Args:
        settings: What to serve and how; ``workers`` front ends.
        listening: The bound socket; closed when the server stops.
    """

    def __init__(self, settings: Settings, listening: socket.socket) -> None:
        self._settings, self._listening = settings, listening
        self._front_ends: dict[int, Process] = {}
        self._engine: Process
        self._stop = asyncio.Event()
        self._failure: str | None = None
        self._is_listening = False

    def serve_forever(self) -> None:
        """Serve until a signal comes or nothing can be served.

        Raises:
            StartupError: If no model can be served, or the engine ends before it has opened its models.
        """
        asyncio.run(self._serve())
        if self._failure is not None:
            raise StartupError(self._failure)

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        for sig in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(sig, self._signalled, sig)
        await self._start_engine()
        await asyncio.gather(*(self._start_front_end(number) for number in range(self._settings.workers)))
        keeping = [asyncio.create_task(self._keep(self._start_engine, self._engine))]
        for number, front_end in self._front_ends.items():
            keeping.append(asyncio.create_task(self._keep(partial(self._start_front_end, number), front_end)))
        watching = asyncio.create_task(self._watch_first_engine(self._engine))
        try:
            await self._stop.wait()
        finally:
            for task in (*keeping, watching):
                task.cancel()
            await asyncio.gather(*keeping, watching, return_exceptions=True)
            await self._shut_down()

    def _signalled(self, sig: int) -> None:
        if self._stop.is_set():
            for process in self._processes():
                process.kill()
            os._exit(128 + sig)
        self._stop.set()

    def _processes(self) -> list[Process]:
        return [*self._front_ends.values(), self._engine]

    # While it serves.

    async def _start_engine(self) -> Process:
        self._engine = engine = await Process.start("the engine", "server.engine")
        engine.send("serve", settings_to_text(self._settings))
        for front_end in self._front_ends.values():
            self._connect(front_end)
        if self._is_listening:
            engine.send("listening", url_of(self._listening))
        return engine

    async def _start_front_end(self, number: int) -> Process:
        front_end = await Process.start(f"front end {number}", "server.frontend", self._reconnect)
        self._front_ends[number] = front_end
        front_end.send("serve", settings_to_text(self._settings), self._listening.fileno())
        self._connect(front_end)
        return front_end

    async def _watch_first_engine(self, engine: Process) -> None:
        """Have it log where the server listens once the front ends do; end the server if it has nothing to serve."""
        await self._all_say(self._front_ends.values(), "connected")
        self._is_listening = True
        engine.send("listening", url_of(self._listening))
        if not await engine.says("opened"):
            self._failure = f"the engine {engine.describe_end()} before it had opened the models"
        elif engine.failure is not None:
            self._failure = engine.failure
        if self._failure is not None:
            self._stop.set()

    async def _keep(self, start: Callable[[], Awaitable[Process]], process: Process) -> None:
        """Start a process again whenever it ends."""
        delay = Delay(time.monotonic())
        while True:
            await process.ended.wait()
            delay_s = delay.next_s(time.monotonic())
            logger.error("%s %s; starting another in %g s", process.name, process.describe_end(), delay_s)
            await asyncio.sleep(delay_s)
            process = await start()

    def _connect(self, front_end: Process) -> None:
        """Connect a front end with the engine."""
        one, other = channel_pair()
        with one, other:
            self._engine.send("connect", "", one.fileno())
            front_end.send("connect", "", other.fileno())

    # The end.

    async def _shut_down(self) -> None:
        most_s = self._settings.shutdown_grace_s + self._settings.drain_timeout_s + STOP_MARGIN_S
        try:
            async with asyncio.timeout(most_s):
                await self._stop_in_order(list(self._front_ends.values()))
        except TimeoutError:
            logger.warning("not stopped in %g s, killing what still runs", most_s)
        for process in self._processes():
            process.kill()
        await asyncio.gather(*(process.ended.wait() for process in self._processes()))
        logger.info("stopped")

    async def _stop_in_order(self, front_ends: list[Process]) -> None:
        self._engine.send("drain")
        await self._engine.says("draining")
        for front_end in front_ends:
            if self._failure is None:
                front_end.send("drain")
            else:
                front_end.send("abort", self._failure)
        if self._failure is None:
            await self._all_say(front_ends, "draining")
            logger.info("stopping: not ready, still serving for %g s", self._settings.shutdown_grace_s)
        await self._all_say(front_ends, "closed")
        self._listening.close()
        logger.info("stopping: socket closed, finishing requests")
        await self._all_say(front_ends, "finished")
        self._engine.send("stop")
        await asyncio.gather(*(process.ended.wait() for process in self._processes()))

    def _reconnect(self, front_end: Process) -> None:
        # An engine that is gone with its channels gets its front ends when it is started again.
        if not self._stop.is_set() and self._engine.is_running:
            self._connect(front_end)

    async def _all_say(self, processes: Iterable[Process], word: Word) -> None:
        await asyncio.gather(*(process.says(word) for process in processes))


class Delay:
    """How long to wait before a process is started again; ``now`` is in monotonic seconds."""

    def __init__(self, now: float) -> None:
        self._delay_s, self._started_s = FIRST_DELAY_S, now

    def next_s(self, now: float) -> float:
        """Return the delay after a process has died now, in seconds."""
        if now - self._started_s > SHORT_LIFE_S:
            self._delay_s = FIRST_DELAY_S
        delay_s, self._delay_s = self._delay_s, min(2 * self._delay_s, LAST_DELAY_S)
        self._started_s = now + delay_s
        return delay_s
