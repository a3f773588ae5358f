"""``slipstream bench`` against a real server, and its generator against servers that misbehave."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import numpy as np
import pytest
from click.testing import CliRunner, Result

from loadtests.bench import bench
from loadtests.connection import header_of
from loadtests.generator import Generator, Target
from loadtests.objectives import Objective
from loadtests.payloads import Payload, PayloadError
from loadtests.shapes import Phase
from loadtests.tallies import FAILED, OK, REFUSALS, UNANSWERED
from loadtests.traffic import Exchange, Prepared, make_kind
from tests.end_to_end.process import Server


def run(server: Server, *options: str) -> Result:
    return CliRunner().invoke(bench, [server.url, "--seconds", "1", "--warm-up", "0", *options])


def test_closed_loops_are_measured(server: Server):
    result = run(server, "--model", "mlp", "--clients", "1,4", "--rows", "2")
    assert result.exit_code == 0, result.output
    assert "mlp: 2 rows, binary" in result.stdout
    names = [line.split("  ")[0] for line in result.stdout.splitlines()]
    assert names[2:5] == ["load", "1 client", "4 clients"]
    assert "load generator: 1 process" in result.stdout


def test_open_loops_keep_their_rates(server: Server):
    result = run(server, "--model", "mlp", "--rate", "50,200", "--wire", "json", "--json", "--seconds", "2")
    assert result.exit_code == 0, result.output
    slow, fast = json.loads(result.stdout)["loads"]
    assert 30 < slow["asked_per_s"] < 70
    assert 150 < fast["asked_per_s"] < 250
    assert fast["answered_per_s"] == fast["asked_per_s"]
    assert 0 < slow["p50_ms"] <= slow["p99_ms"]


def test_refusals_are_counted_and_no_failure(server: Server):
    result = run(server, "--model", "slow", "--rate", "300", "--timeout-ms", "200", "--json")
    assert result.exit_code == 0, result.output
    (load,) = json.loads(result.stdout)["loads"]
    assert load["refused_429"] + load["expired_504"] > 100
    assert load["good_per_s"] < load["asked_per_s"] / 2


def test_missed_p99_sets_the_exit_code(server: Server):
    result = run(server, "--model", "slow", "--clients", "2", "--max-p99-ms", "1")
    assert result.exit_code == 1
    assert "FAILED: 2 clients: p99 is" in result.stderr


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ((), "the server has mlp, slow, two_inputs; name one with --model"),
        (("--model", "none"), "answers with 404"),
        (("--model", "mlp", "--clients", "0"), "no list of positive numbers"),
        (("--model", "mlp", "--clients", "x"), "no list of positive numbers"),
        (("--model", "two_inputs", "--version", "9"), "answers with 404"),
    ],
)
def test_what_cannot_be_measured_says_why(server: Server, options: tuple[str, ...], text: str):
    result = run(server, *options)
    assert result.exit_code != 0
    assert text in result.stderr


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("http://127.0.0.1:9", "cannot be reached"),
        ("ftp://somewhere", "is no address"),
        ("http://host:99999", "Port out of range"),
    ],
)
def test_wrong_addresses_say_so(url: str, text: str):
    result = CliRunner().invoke(bench, [url, "--model", "m"])
    assert result.exit_code == 1
    assert text in result.stderr


ANSWER = json.dumps({"outputs": [{"name": "y", "datatype": "FP32", "shape": [1], "data": [1.0]}]}).encode()
Respond = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def listening(respond: Respond) -> AsyncIterator[Generator]:
    """A generator aimed at a server that reads each request and then does as told."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(int(header_of(head, b"content-length")))
                await respond(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        exchange = Exchange(Payload(b"{}", {}), {"y": np.ones(1, np.float32)})
        prepared = Prepared(make_kind({"model": "m"}), [exchange])
        yield Generator(Target("127.0.0.1", port, tls=False), prepared, Objective(slo_ms=1000))


def answer(status: int, body: bytes = ANSWER) -> Respond:
    async def respond(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.01)
        writer.write(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body))

    return respond


async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.close()


async def say_nothing(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(60)


PHASES = {"closed": Phase("p", 0, 0.5, 0.0), "open": Phase("p", 0, 0.5, 40.0)}


@pytest.mark.parametrize("loop", PHASES)
@pytest.mark.parametrize(
    ("respond", "outcome"),
    [
        (answer(200), OK),
        (answer(429), REFUSALS[429]),
        (answer(503), REFUSALS[503]),
        (answer(504), REFUSALS[504]),
        (answer(500), FAILED),
        (hang_up, FAILED),
    ],
)
async def test_each_answer_is_counted_as_what_it_is(loop: str, respond: Respond, outcome: str):
    async with listening(respond) as generator:
        await generator.run(PHASES[loop], clients=2)
    tally = generator.recording.between(0, 9)
    assert set(tally.outcomes) == {outcome}
    assert tally.asked >= 5
    assert bool(generator.wrong) == (outcome == FAILED)


@pytest.mark.parametrize("loop", PHASES)
async def test_no_answer_is_counted_when_the_wait_is_over(loop: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("loadtests.generator.DRAIN_S", 0.2)
    async with listening(say_nothing) as generator:
        await generator.run(PHASES[loop], clients=2)
    tally = generator.recording.between(0, 9)
    assert set(tally.outcomes) == {UNANSWERED}
    assert tally.asked == 2 if loop == "closed" else tally.asked > 5


@pytest.mark.parametrize("body", [ANSWER.replace(b"1.0", b"9.0"), b"no JSON"])
async def test_wrong_answers_are_failures(body: bytes):
    async with listening(answer(200, body)) as generator:
        await generator.run(PHASES["closed"], clients=1)
    assert generator.recording.between(0, 9).outcomes[FAILED] > 0
    assert generator.wrong


async def test_slow_answers_do_not_hold_back_what_is_due():
    async def slowly(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.3)
        await answer(200)(reader, writer)

    async with listening(slowly) as generator:
        await generator.run(Phase("p", 0, 1, 400.0), clients=0)
    tally = generator.recording.between(0, 9)
    assert tally.answered == tally.asked
    # 120 requests are under way at a time; there are connections for all of them, so none waits for another.
    assert tally.percentile_ms(0.99) < 900


@pytest.mark.parametrize(
    ("head", "value"),
    [
        (b"HTTP/1.1 200 OK\r\ncontent-length: 12\r\nx: y\r\n\r\n", b"12"),
        (b"HTTP/1.1 200 OK\r\nContent-Length:12", b"12"),
        (b"HTTP/1.1 200 OK\r\nnot-content-length: 3\r\n\r\n", b""),
    ],
)
def test_header_is_found_in_any_case(head: bytes, value: bytes):
    assert header_of(head, b"content-length") == value


async def test_unreachable_servers_raise():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    exchange = Exchange(Payload(b"{}", {}), {})
    generator = Generator(
        Target("127.0.0.1", port, tls=False), Prepared(make_kind({"model": "m"}), [exchange]), Objective()
    )
    with pytest.raises(OSError, match="Connect call failed"):
        await generator.run(PHASES["closed"], clients=1)


def test_targets():
    assert Target.of("https://a.b") == Target("a.b", 443, tls=True)
    assert Target.of("http://[::1]:81/x") == Target("::1", 81, tls=False)
    with pytest.raises(PayloadError):
        Target.of("a.b")
