"""An HTTP/1.1 connection. Infer requests are answered on it directly, everything else through ASGI.

What ASGI asks for, a scope, an event, a message for each part and a timer for each wait, costs a small request as much
as its decoding, its share of a batch and its encoding together.

A request line with headers must not be larger than ``MAX_HEAD_BYTES``, and neither they nor a body may take longer to
come than the listener allows. What is refused for that gets an answer in the one error form.
"""

import asyncio
from collections.abc import Callable
from typing import Any, ClassVar, cast
from urllib.parse import unquote

import httptools
from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from server.errors import BodyTooLarge, HeadersTooLarge, MalformedRequest, RequestError, RequestTimeout
from server.http import JOINED_BYTES, Answer, Body, answer_of
from server.infer import Application, InferBranch, infer_target
from server.intake import Intake

# Longer than the idle time of the usual load balancers and client pools (60 s): a server that closes first answers
# requests that are already under way with a reset.
KEEP_ALIVE_S = 75
# Request line and headers; what proxies and cookies make of them stays far below.
MAX_HEAD_BYTES = 64 * 1024
_CLOSE = (b"connection", b"close")
_CLOSE_LINE = b"connection: close\r\n"
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_MOST_TARGETS = 1024


class Connection(HttpToolsProtocol):
    """Uvicorn's protocol with a shorter way for infer requests.

    Args:
        config: Uvicorn's; its application is an ``Application``.
        server_state: Uvicorn's.
        app_state: Uvicorn's.
        intake: The turns of the loop's connections.

    Attributes:
        infer: Answers infer requests.
        running: The exchange that is being answered.
    """

    # Infer targets of the URLs that were asked for last, and the headers that every answer has, in the list that
    # uvicorn renews each second and as they are sent. Of all connections: they are the same for all.
    _targets: ClassVar[dict[bytes, tuple[str, str] | None]] = {}
    _defaults: ClassVar[list[tuple[bytes, bytes]]] = []
    _default_head: ClassVar[bytes] = b""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,  # uvicorn names it
        *,
        intake: Intake,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._intake = intake
        self.infer: InferBranch[Any] = cast(Application, self.app).infer
        self.running: Exchange | None = None
        self._unread = 0  # pieces of data that wait
        self._is_in_head, self._head_bytes = True, 0
        # Since when a head, a body, or the next request is waited for; 0 when it is not.
        self._head_since_s = self._body_since_s = self._idle_since_s = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to wait for the first request."""
        super().connection_made(transport)  # type: ignore[arg-type]
        self._head_since_s = self.loop.time()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop what is answered: nobody reads it."""
        if self.running is not None:
            self.running.leave()
        if isinstance(self.cycle, Exchange):
            self.cycle = None
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what came, when its turn comes."""
        self._idle_since_s = 0.0
        if not self._intake.take(self._parse, data):
            self._unread += 1
            if self._unread > 1:
                self.flow.pause_reading()

    def _parse(self, data: bytes) -> None:
        if self._unread:
            self._unread -= 1
            if not self._unread and not self.pipeline:
                self.flow.resume_reading()
        if self.transport.is_closing():
            return
        super().data_received(data)
        if not self._is_in_head:
            self._head_bytes, self._head_since_s = 0, 0.0
            if isinstance(self.cycle, Exchange):
                self.cycle.start()  # if its body is still to come, it may be refused before
            return
        self._head_bytes += len(data)
        self._head_since_s = self._head_since_s or self.loop.time()
        if self._head_bytes > MAX_HEAD_BYTES:
            self._refuse(
                HeadersTooLarge(
                    f"the request line and headers have {self._head_bytes} bytes so far; "
                    f"this server takes {MAX_HEAD_BYTES}"
                )
            )

    # What the parser finds.

    def on_message_begin(self) -> None:
        """Begin a request."""
        self.url, self.headers, self.expect_100_continue = b"", [], False
        self._is_in_head = True

    def on_headers_complete(self) -> None:
        """Decide which way the request goes."""
        self._is_in_head = False
        self._body_since_s = self.loop.time()
        target = self._target() if self.parser.get_method() == b"POST" else None
        if target is None or self.parser.should_upgrade():
            self._hand_to_asgi()
            return
        previous = self.cycle
        may_start = previous is None or previous.response_complete
        keeps_alive = self.parser.should_keep_alive() and self.parser.get_http_version() != "1.0"
        self.cycle = exchange = Exchange(  # type: ignore[assignment]
            self, target, dict(self.headers), keeps_alive, self.expect_100_continue, may_start
        )
        if not may_start:
            self.flow.pause_reading()
            self.pipeline.appendleft((exchange, self.app))  # type: ignore[arg-type]

    def on_body(self, body: bytes) -> None:
        """Pass a part of the body on."""
        if isinstance(self.cycle, Exchange):
            self.cycle.feed(body)
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """Pass the end of the body on."""
        if isinstance(self.cycle, Exchange):
            self.cycle.complete()
        else:
            super().on_message_complete()

    @property
    def waited_s(self) -> float:
        """Seconds that what is read now has waited."""
        return self._intake.waited_s

    def _target(self) -> tuple[str, str] | None:
        targets, url = self._targets, self.url
        if url not in targets:
            if len(targets) >= _MOST_TARGETS:
                targets.clear()
            targets[url] = infer_target(unquote(httptools.parse_url(url).path.decode("ascii")))
        return targets[url]

    def _hand_to_asgi(self) -> None:
        url, headers, expects_continue = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expects_continue
        self.headers += headers  # in place: the scope has this list
        super().on_headers_complete()

    # What is answered.

    def send(self, answer: Answer, *, keep_alive: bool) -> bool:
        """Write an answer; return whether the connection may stay open after it."""
        defaults = self.server_state.default_headers
        if defaults is not Connection._defaults:
            Connection._default_head = b"".join(b"%b: %b\r\n" % header for header in defaults)
            Connection._defaults = defaults
        says_close = _CLOSE in defaults or (answer.status != 200 and _CLOSE in answer.headers)
        head = [STATUS_LINE[answer.status], self._default_head]
        head += [b"%b: %b\r\n" % header for header in answer.headers]
        head.append(b"\r\n" if keep_alive or says_close else _CLOSE_LINE + b"\r\n")
        parts = answer.parts
        if sum(map(len, parts)) <= JOINED_BYTES:
            self.transport.write(b"".join([*head, *parts]))
        else:
            self.transport.writelines([b"".join(head), *parts])
        return keep_alive and not says_close

    def on_response_complete(self) -> None:
        """Go on with the next request; without one, begin to be idle. Replaces uvicorn's timer for each answer."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if not self.pipeline:
            self._idle_since_s = self.loop.time()
            return
        cycle, app = self.pipeline.pop()
        if isinstance(cycle, Exchange):
            cycle.may_start = True
            cycle.start()
        else:
            self._start_asgi_task(cycle, app)

    # What does not come.

    def look(self, timeout_s: float) -> None:
        """Refuse a head or a body that is waited for longer than this, and close the connection if it is idle."""
        now = self.loop.time()
        if self._idle_since_s and now - self._idle_since_s >= KEEP_ALIVE_S:
            self.transport.close()
        elif self._head_since_s:
            if now - self._head_since_s >= timeout_s and not self._is_answering:
                text = f"the request headers did not come within {timeout_s:g} s (set --body-timeout-s)"
                self._refuse(RequestTimeout(text))
        elif self._is_answering and now - self._body_since_s >= timeout_s:
            error = RequestTimeout(f"the request body did not come within {timeout_s:g} s (set --body-timeout-s)")
            if isinstance(self.cycle, Exchange):
                self.cycle.fail(error)
            elif self.cycle.more_body:
                self._refuse(error)

    def shutdown(self) -> None:
        """Close the connection when nothing is under way on it."""
        if not self._unread:
            super().shutdown()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP."""
        self._refuse(MalformedRequest(msg))

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _refuse(self, error: RequestError) -> None:
        self._head_since_s = 0.0
        if self.transport.is_closing():
            return
        half_sent = self._is_answering and getattr(self.cycle, "response_started", False)
        if half_sent or self.running or self.pipeline:
            self.transport.close()
            return
        self.send(answer_of(error), keep_alive=False)
        self.transport.close()


class Exchange:
    """One infer request and its answer; has what uvicorn's protocol looks at in its own cycle.

    Attributes:
        name: The model.
        version: Its version; empty for the default one.
        headers: Name in lower case -> value.
        expects_continue: Whether the client waits for ``100 Continue`` before it sends the body.
        keep_alive: Whether the connection stays open after the answer.
        may_start: Whether all requests before it on the connection have been answered.
        response_complete: Whether it was answered.
        waited_s: Seconds that its head waited before it was read.
    """

    __slots__ = (
        "_body", "_cancel", "_connection", "_error", "_is_whole", "_task", "_whole", "expects_continue", "headers",
        "keep_alive", "may_start", "name", "response_complete", "version", "waited_s",
    )  # fmt: skip

    def __init__(
        self,
        connection: Connection,
        target: tuple[str, str],
        headers: dict[bytes, bytes],
        keep_alive: bool,
        expects_continue: bool,
        may_start: bool,
    ) -> None:
        self._connection, self.headers = connection, headers
        self.name, self.version = target
        self.keep_alive, self.expects_continue, self.may_start = keep_alive, expects_continue, may_start
        self.response_complete = self._is_whole = False
        self.waited_s = connection.waited_s
        self._body = Body(connection.infer.max_body_bytes)
        self._error: RequestError | None = None
        self._whole: asyncio.Future[None] | None = None
        self._cancel: Callable[[], object] | None = None

    def feed(self, chunk: bytes) -> None:
        """Take a part of the body."""
        if self._error is None and not self.response_complete:
            try:
                self._body.add(chunk)
            except BodyTooLarge as exc:
                self.fail(exc)

    def complete(self) -> None:
        """Learn that the body has come."""
        self._is_whole = True
        if self._whole is not None and not self._whole.done():
            self._whole.set_result(None)
        self.start()

    def fail(self, error: RequestError) -> None:
        """Refuse the body, if it has not come yet."""
        if not self._is_whole:
            self._error = error
            if self._whole is not None and not self._whole.done():
                self._whole.set_exception(error)

    def start(self) -> None:
        """Begin to answer, if it is its turn and has not begun."""
        connection = self._connection
        if self._cancel is not None or not self.may_start or connection.transport.is_closing():
            return
        connection.running = self
        if self._is_whole and self._error is None:
            self._cancel = connection.infer.begin(self, self._body.whole, self._send)
        if self._cancel is None:
            self._task = task = connection.loop.create_task(self._answer())
            self._cancel = task.cancel
            connection.tasks.add(task)
            # Not at the end of the coroutine: it does not run at all when it is cancelled before its first step.
            task.add_done_callback(connection.tasks.discard)

    def leave(self) -> None:
        """Stop: the client has left."""
        self.response_complete = True
        if self._cancel is not None:
            self._cancel()

    async def body(self) -> bytes | bytearray:
        """Return the body once it has come; see ``infer.Call``."""
        if self._error is not None:
            raise self._error
        if not self._is_whole:
            if self.expects_continue:
                self._connection.transport.write(_CONTINUE)
            self._whole = self._connection.loop.create_future()
            await self._whole
        return self._body.whole

    async def _answer(self) -> None:
        connection = self._connection
        try:
            self._send(await connection.infer.answer(self))
        except BaseException:
            connection.transport.close()  # cancelled: the client has left, or the server ends
            raise

    def _send(self, answer: Answer) -> None:
        connection = self._connection
        if connection.transport.is_closing():
            return
        self.keep_alive = connection.send(answer, keep_alive=self.keep_alive)
        if connection.flow.write_paused and self.keep_alive:
            self._task = connection.loop.create_task(self._drain())
        else:
            self._end()

    async def _drain(self) -> None:
        await self._connection.flow.drain()
        self._end()

    def _end(self) -> None:
        connection = self._connection
        self.response_complete = True
        # The connection may stay open for long, and keeps its last exchange: without the tensors.
        self._body.whole, self._cancel = b"", _nothing
        connection.running = None
        if not self.keep_alive:
            connection.transport.close()
        connection.on_response_complete()


def _nothing() -> None:
    """Cancel what was answered already."""
