"""Two ends of a channel in one loop: order, memory, and the end of either side."""

import asyncio
import gc
import socket
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from server import channel
from server.channel import HELLO, INFER, INLINE_BYTES, PACKET_BYTES, Channel, channel_pair
from server.messages import Buffer, Codecs
from server.tensors import InferRequest

SLAB = 256 * 1024
codec = Codecs().infer


class End:
    """One end that writes down what it gets."""

    def __init__(self, connection: socket.socket, leases: bool, slab_bytes: int = SLAB) -> None:
        self.received: list[tuple[int, int, int]] = []
        self.messages: list[tuple[Buffer, int]] = []
        self.lost = asyncio.Event()
        self.rooms = 0
        self._changed = asyncio.Event()
        self.channel = Channel(connection, slab_bytes, leases=leases, received=self._receive, lost=self.lost.set)
        self.channel.made_room = self._made_room

    def _receive(self, kind: int, target: int, number: int, message: Buffer, head_bytes: int) -> None:
        self.received.append((kind, target, number))
        if kind != HELLO:
            self.messages.append((message, head_bytes))
        self._changed.set()

    def _made_room(self) -> None:
        self.rooms += 1
        self._changed.set()

    async def until(self, condition: Any) -> None:
        async with asyncio.timeout(30):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    def post(self, number: int, floats: int) -> bool:
        request = InferRequest({"x": np.full(floats, number, np.float32)}, id=str(number))
        return self.channel.post(INFER, 5, number, codec.encode(request))

    def take(self) -> InferRequest:
        message, head_bytes = self.messages.pop(0)
        return codec.decode(message, head_bytes)


@pytest.fixture
async def ends() -> Any:
    one, other = channel_pair()
    front, engine = End(one, leases=False), End(other, leases=True)
    await front.until(lambda: front.channel.is_open)
    await engine.until(lambda: engine.channel.is_open)
    yield front, engine
    front.channel.close()
    engine.channel.close()


Ends = tuple[End, End]


async def test_messages_arrive_in_order_whatever_their_size(ends: Ends) -> None:
    front, engine = ends
    sizes = [0, 1, INLINE_BYTES // 4, 5000, 8, SLAB // 4, 3, 5000]  # inline, in the slab, and in memory of its own
    for number, floats in enumerate(sizes):
        assert front.post(number, floats)
    await engine.until(lambda: len(engine.messages) == len(sizes))
    assert engine.received[1:] == [(INFER, 5, number) for number in range(len(sizes))]
    for number, floats in enumerate(sizes):
        request = engine.take()
        assert request.id == str(number)
        assert request.inputs["x"].tolist() == [number] * floats


async def test_what_is_posted_in_one_iteration_leaves_in_few_packets(ends: Ends) -> None:
    front, engine = ends
    sent: list[int] = []

    class Counting:
        def __init__(self, inner: socket.socket) -> None:
            self._inner = inner

        def send(self, packet: bytes) -> int:
            sent.append(len(packet))
            return self._inner.send(packet)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._inner, name)

    front.channel._socket = Counting(front.channel._socket)  # type: ignore[assignment]
    for number in range(1000):
        assert front.post(number, 64)
    await engine.until(lambda: len(engine.messages) == 1000)
    assert max(sent) <= PACKET_BYTES
    assert len(sent) <= 2 + sum(sent) // PACKET_BYTES * 2


async def test_more_than_the_socket_holds_waits_for_the_reader(ends: Ends) -> None:
    front, engine = ends
    for number in range(20_000):  # some 6 MB, far beyond a socket's buffer
        front.post(number, 64)
    await engine.until(lambda: len(engine.messages) == 20_000)
    assert [engine.take().id for _ in range(20_000)] == [str(number) for number in range(20_000)]


async def test_full_slab_has_no_room_until_the_reader_lets_go(ends: Ends) -> None:
    front, engine = ends
    posted = 0
    while front.post(posted, 5000):
        posted += 1
    assert posted == SLAB // 32_768
    await engine.until(lambda: len(engine.messages) == posted)
    requests = [engine.take() for _ in range(posted)]
    assert not front.post(99, 5000)
    assert front.post(99, 8), "small messages need no room"
    kept = requests[3].inputs["x"][10:20]
    used = front.channel.used_bytes
    del requests
    await front.until(lambda: front.channel.used_bytes < used)
    await front.until(lambda: front.rooms == posted - 1)
    assert front.channel.used_bytes == 32_768, "one is kept by a slice of its tensor"
    assert kept.tolist() == [3] * 10
    assert front.post(100, 5000)
    assert kept.tolist() == [3] * 10
    del kept
    engine.messages.clear()
    await front.until(lambda: front.rooms >= posted)


async def test_pages_of_a_burst_go_back_to_the_system(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    front, engine = ends
    monkeypatch.setattr(channel, "KEPT_BYTES", 64 * 1024)
    for number in range(4):
        front.post(7, 5000)
        await engine.until(lambda: bool(engine.messages))
        if number < 3:
            held = engine.take()
            del held
            await front.until(lambda: front.channel.used_bytes == 0)
    slab = front.channel._slab
    assert slab is not None
    engine.messages.clear()
    await front.until(lambda: front.channel.used_bytes == 0)
    assert any(slab[: 32 * 1024]), "what is little stays"
    for number in range(4):
        assert front.post(1 + number, 5000)
    await engine.until(lambda: len(engine.messages) == 4)
    assert any(slab[64 * 1024 :])
    requests = [engine.take() for _ in range(4)]
    assert [each.inputs["x"][-1] for each in requests] == [1, 2, 3, 4]
    kept = requests.pop(0)
    requests.clear()
    await front.until(lambda: front.rooms >= 7)
    assert any(slab[64 * 1024 :]), "one is still read"
    assert kept.inputs["x"][-1] == 1
    del kept
    await front.until(lambda: front.channel.used_bytes == 0)
    assert not any(slab[64 * 1024 :])
    assert any(slab[: 64 * 1024])
    assert front.post(9, 5000)
    await engine.until(lambda: bool(engine.messages))
    assert engine.take().inputs["x"].tolist() == [9] * 5000


async def test_memory_of_its_own_is_bounded_by_the_slab(ends: Ends) -> None:
    front, engine = ends
    floats = SLAB // 4 * 3 // 4
    assert front.post(1, floats)
    assert not front.post(2, floats)
    await engine.until(lambda: len(engine.messages) == 1)
    assert engine.take().inputs["x"].tolist() == [1] * floats
    await front.until(lambda: front.channel.used_bytes == 0)
    assert front.post(2, 10 * SLAB), "one alone may be of any size"
    await engine.until(lambda: len(engine.messages) == 1)
    assert engine.take().inputs["x"].sum() == 20 * SLAB


async def test_messages_that_are_copied_need_no_room_for_long(ends: Ends) -> None:
    front, engine = ends
    for number in range(100):
        await engine.until(lambda number=number: engine.post(number, 5000))
    await front.until(lambda: len(front.messages) == 100)
    await engine.until(lambda: engine.channel.used_bytes == 0)
    assert [front.take().inputs["x"][0] for _ in range(100)] == list(range(100))


async def test_lease_dropped_on_another_thread_makes_room(ends: Ends) -> None:
    front, engine = ends
    front.post(1, 5000)
    await engine.until(lambda: len(engine.messages) == 1)
    threading.Thread(target=engine.messages.clear).start()
    await front.until(lambda: front.channel.used_bytes == 0)


async def test_end_of_one_side_is_told_to_the_other_after_what_was_posted(ends: Ends) -> None:
    front, engine = ends
    front.post(1, 8)
    front.channel.close()
    async with asyncio.timeout(30):
        await engine.lost.wait()
    assert [number for _, _, number in engine.received] == [0, 1]
    assert not front.lost.is_set()
    assert engine.post(2, 8), "what is posted into the void is lost, and no error"


async def test_leased_tensors_outlive_the_front_end(ends: Ends) -> None:
    front, engine = ends
    front.post(7, 5000)
    await engine.until(lambda: len(engine.messages) == 1)
    request = engine.take()
    front.channel.close()
    async with asyncio.timeout(30):
        await engine.lost.wait()
    assert request.inputs["x"].tolist() == [7] * 5000


@pytest.mark.parametrize("packet", [b"\xff" * 80, bytes(79), channel._DESCRIPTOR.pack(10, 1, 0, 1, 9, 0, 1000)])
async def test_nonsense_closes_the_channel(packet: bytes, caplog: pytest.LogCaptureFixture) -> None:
    one, other = channel_pair()
    with one:
        engine = End(other, leases=True)
        one.send(packet)
        async with asyncio.timeout(30):
            await engine.lost.wait()
    assert "cannot be read" in caplog.text


@pytest.mark.parametrize("kind", [channel.INFER, channel.RELEASE])
async def test_descriptor_of_memory_that_is_not_there_closes_the_channel(kind: int, ends: Ends) -> None:
    front, engine = ends
    front.channel._put(channel._DESCRIPTOR.pack(kind, channel._SLAB, 0, 1, 9, 1 << 40, 1000))
    async with asyncio.timeout(30):
        await engine.lost.wait()


async def test_nothing_stays_open_or_mapped() -> None:
    def counted() -> tuple[int, int]:
        return len(list(Path("/proc/self/fd").iterdir())), Path("/proc/self/maps").read_text().count("memfd:slipstream")

    gc.collect()
    before = counted()
    gc.disable()  # an idle engine is never collected
    try:
        for _ in range(3):
            one, other = channel_pair()
            front, engine = End(one, leases=False), End(other, leases=True)
            await front.until(lambda front=front: front.channel.is_open)
            for number, floats in enumerate((5000, SLAB, SLAB)):
                front.post(number, floats)
            await engine.until(lambda engine=engine: len(engine.messages) >= 2)
            front.channel.close()
            engine.channel.close()
            engine.messages.clear()
        assert counted() == before
    finally:
        gc.enable()
