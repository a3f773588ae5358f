"""Bodies in, answers out."""

import gzip
import json
import logging
import sys
import zlib
from typing import Any

import pytest

from server import errors
from server.errors import (
    BodyTooLarge,
    MalformedRequest,
    QueueFull,
    RequestTimeout,
    SlipstreamError,
    UnsupportedEncoding,
)
from server.http import JOINED_BYTES, Answer, ClientLeft, answer_of, check_head, decompressed, read_body, send_answer

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

LIMIT = 1000


class Receiver:
    """An ASGI ``receive`` that hands out chunks and counts its calls."""

    def __init__(self, *chunks: bytes, leaves: bool = False) -> None:
        self.calls = 0
        self._messages: list[dict[str, Any]] = [
            {"type": "http.request", "body": chunk, "more_body": leaves or index < len(chunks) - 1}
            for index, chunk in enumerate(chunks)
        ]
        if leaves:
            self._messages.append({"type": "http.disconnect"})

    async def __call__(self) -> dict[str, Any]:
        self.calls += 1
        return self._messages[self.calls - 1]


async def read(receive: Receiver, **headers: str) -> bytes:
    raw = {name.replace("_", "-").encode(): value.encode() for name, value in headers.items()}
    check_head(raw, LIMIT)
    return bytes(await decompressed(await read_body(receive, LIMIT), raw, LIMIT))


async def test_body_in_one_message_or_many_is_the_same() -> None:
    assert await read(Receiver(b"abc")) == b"abc"
    assert await read(Receiver(b"a", b"", b"bc")) == b"abc"
    assert await read(Receiver(b"", b"abc", b"")) == b"abc"
    assert await read(Receiver(b"x" * LIMIT)) == b"x" * LIMIT


async def test_content_length_over_the_limit_is_refused_before_anything_is_read() -> None:
    receive = Receiver(b"")
    with pytest.raises(BodyTooLarge, match=f"is {LIMIT + 1} bytes; this server takes {LIMIT}"):
        await read(receive, content_length=str(LIMIT + 1))
    assert receive.calls == 0


async def test_chunked_body_is_refused_as_soon_as_it_passes_the_limit() -> None:
    receive = Receiver(*[b"x" * 400] * 10)
    with pytest.raises(BodyTooLarge):
        await read(receive)
    assert receive.calls == 3


async def test_client_that_leaves_before_the_end_is_noticed() -> None:
    with pytest.raises(ClientLeft):
        await read(Receiver(b"abc", leaves=True))


@pytest.mark.parametrize(
    ("encoding", "compress"),
    [("gzip", gzip.compress), ("GZIP", gzip.compress), ("deflate", zlib.compress), ("zstd", zstd.compress)],
)
async def test_compressed_body_is_decompressed(encoding: str, compress: Any) -> None:
    assert await read(Receiver(compress(b"text" * 100)), content_encoding=encoding) == b"text" * 100


async def test_identity_encoding_is_the_body_itself() -> None:
    assert await read(Receiver(b"abc"), content_encoding="identity") == b"abc"


async def test_zip_bomb_is_refused_at_the_limit() -> None:
    for encoding, compress in (("gzip", gzip.compress), ("zstd", zstd.compress)):
        bomb = compress(b"\0" * 20_000_000)[:LIMIT]
        with pytest.raises(BodyTooLarge, match="decompresses to more than"):
            await read(Receiver(bomb), content_encoding=encoding)


async def test_zstd_window_that_would_take_much_memory_is_refused() -> None:
    options = {zstd.CompressionParameter.window_log: 27, zstd.CompressionParameter.content_size_flag: 0}
    compressor = zstd.ZstdCompressor(options=options)
    body = compressor.compress(b"a") + compressor.flush()
    with pytest.raises(MalformedRequest, match="too much memory"):
        await read(Receiver(body), content_encoding="zstd")


@pytest.mark.parametrize(("encoding", "compress"), [("gzip", gzip.compress), ("zstd", zstd.compress)])
async def test_damaged_compression_is_malformed(encoding: str, compress: Any) -> None:
    whole = compress(b"text")
    for body, reason in (
        (b"not compressed", f"not valid {encoding} data"),
        (whole[:-3], "truncated"),
        (whole + b"more", "goes on after its end"),
        (b"", "truncated"),
    ):
        with pytest.raises(MalformedRequest, match=reason):
            await read(Receiver(body), content_encoding=encoding)


async def test_unknown_encoding_is_refused_before_anything_is_read() -> None:
    receive = Receiver(b"")
    with pytest.raises(UnsupportedEncoding, match="'br'; use gzip, deflate, zstd or none"):
        await read(receive, content_encoding="br")
    assert receive.calls == 0


def test_late_body_closes_its_connection() -> None:
    answer = answer_of(RequestTimeout("late"))
    assert (answer.status, (b"connection", b"close") in answer.headers) == (408, True)


def leaves_of(kind: type[SlipstreamError]) -> list[type[SlipstreamError]]:
    below = [leaf for child in kind.__subclasses__() for leaf in leaves_of(child)]
    return [kind, *below]


@pytest.mark.parametrize("kind", leaves_of(SlipstreamError), ids=lambda kind: kind.__name__)
def test_every_error_becomes_an_answer_with_its_status_and_code(kind: type[SlipstreamError]) -> None:
    error = kind("what happened", 1.0) if issubclass(kind, errors.Refused) else kind("what happened")
    answer = answer_of(error)
    assert answer.status == kind.status
    assert json.loads(b"".join(answer.parts)) == {"error": "what happened", "code": kind.code}
    headers = dict(answer.headers)
    assert headers[b"content-type"] == b"application/json"
    assert int(headers[b"content-length"]) == sum(map(len, answer.parts))
    assert (b"retry-after" in headers) == (kind.status in (429, 503))


@pytest.mark.parametrize(("seconds", "header"), [(0.0, b"1"), (0.2, b"1"), (2.0, b"2"), (2.1, b"3")])
def test_retry_after_is_whole_seconds_rounded_up(seconds: float, header: bytes) -> None:
    assert dict(answer_of(QueueFull("full", seconds)).headers)[b"retry-after"] == header


def test_defect_is_logged_once_and_kept_from_the_client(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        answer = answer_of(ValueError("a secret"))
    assert answer.status == 500
    assert b"secret" not in b"".join(answer.parts)
    assert len(caplog.records) == 1
    assert "a secret" in caplog.text


def test_error_text_that_is_no_unicode_is_still_told() -> None:
    answer = answer_of(MalformedRequest("unknown datatype '\ud800'"))
    assert json.loads(answer.parts[0])["error"] == "unknown datatype '?'"


def test_connection_closes_when_the_client_waits_for_leave_to_send() -> None:
    assert (b"connection", b"close") in answer_of(BodyTooLarge("large"), expects_continue=True).headers
    assert (b"connection", b"close") not in answer_of(BodyTooLarge("large")).headers


@pytest.mark.parametrize(
    ("parts", "sent"),
    [
        ([b"ab", memoryview(b"cd")], [b"abcd"]),
        ([b"a" * JOINED_BYTES, memoryview(b"cd")], [b"a" * JOINED_BYTES, b"cd"]),
        ([b""], [b""]),
    ],
)
async def test_small_parts_are_joined_and_large_ones_are_not(parts: list[Any], sent: list[bytes]) -> None:
    messages: list[Any] = []

    async def send(message: Any) -> None:
        messages.append(message)

    await send_answer(send, Answer(200, [], parts))
    assert [bytes(message["body"]) for message in messages[1:]] == sent
    assert [message["more_body"] for message in messages[1:]] == [True] * (len(sent) - 1) + [False]
