"""Frames and descriptors over a real socket pair."""

from __future__ import annotations

import array
import os
import socket
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xdit_sidecar.protocol import limits
from xdit_sidecar.protocol.errors import BadMessage, TooLarge
from xdit_sidecar.protocol.frames import FrameStream, StreamClosed


@pytest.fixture
def pair() -> Iterator[tuple[FrameStream, FrameStream]]:
    streams = make_pair()
    yield streams
    for stream in streams:
        stream.close()


def make_pair() -> tuple[FrameStream, FrameStream]:
    one, other = socket.socketpair()
    return FrameStream(one), FrameStream(other)


def marked_descriptor(mark: bytes) -> int:
    """A descriptor that can be told from others."""
    descriptor = os.memfd_create("test")
    os.write(descriptor, mark)
    return descriptor


def mark_of(descriptor: int) -> bytes:
    try:
        return os.pread(descriptor, 16, 0)
    finally:
        os.close(descriptor)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def receive(stream: FrameStream) -> list[bytes]:
    stream.read_available()
    frames = []
    while (frame := stream.take_frame()) is not None:
        frames.append(frame)
    return frames


@settings(max_examples=50)
@given(
    st.lists(st.binary(max_size=300), max_size=8),
    st.lists(st.integers(1, 400), min_size=1, max_size=40),
)
def test_frames_survive_any_chunking(payloads: list[bytes], cuts: list[int]) -> None:
    raw, sock = socket.socketpair()
    stream = FrameStream(sock)
    data = b"PREAMBLE" + b"".join(struct.pack("!I", len(p)) + p for p in payloads)
    received: list[bytes] = []
    greeted = False
    for i in range(len(data)):
        size = cuts[i % len(cuts)]
        raw.send(data[:size])
        data = data[size:]
        stream.read_available()
        if not greeted:
            preamble = stream.take_preamble(8)
            assert preamble in (None, b"PREAMBLE")
            greeted = preamble is not None
        if greeted:
            while (frame := stream.take_frame()) is not None:
                received.append(frame)
        if not data:
            break
    assert received == payloads
    raw.close()
    stream.close()


def test_descriptors_arrive_with_their_frames(pair: tuple[FrameStream, FrameStream]) -> None:
    sender, receiver = pair
    before = descriptors()
    for i in range(3):
        sender.queue_frame(b"plain")
        sender.queue_frame(b"with %d" % i, marked_descriptor(b"mark %d" % i))
    sender.flush()
    got = []
    for _ in range(10):
        for frame in receive(receiver):
            if frame != b"plain":
                descriptor = receiver.take_descriptor()
                assert not os.get_inheritable(descriptor)
                got.append((frame, mark_of(descriptor)))
    assert got == [(b"with %d" % i, b"mark %d" % i) for i in range(3)]
    assert descriptors() == before, "the sender keeps none"
    with pytest.raises(BadMessage, match="none came"):
        receiver.take_descriptor()


def test_a_descriptor_that_waits_for_a_full_socket_goes_with_its_own_frame(
    pair: tuple[FrameStream, FrameStream],
) -> None:
    sender, receiver = pair
    sender.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    big = b"x" * 60_000
    for i in range(4):
        sender.queue_frame(big, marked_descriptor(b"%d" % i))
    frames, marks = [], []
    for _ in range(400):
        sender.flush()
        frames += receive(receiver)
        while len(marks) < len(frames):
            marks.append(mark_of(receiver.take_descriptor()))
        if len(frames) == 4:
            break
    assert frames == [big] * 4
    assert marks == [b"0", b"1", b"2", b"3"]
    assert not sender.has_unsent


@pytest.mark.parametrize(("messages", "each"), [(1, 9), (1, 200), (20, 1), (3, 8)])
def test_a_flood_of_descriptors_is_refused_and_none_stays(messages: int, each: int) -> None:
    before = descriptors()
    raw, sock = socket.socketpair()
    stream = FrameStream(sock)
    mine = [os.dup(0) for _ in range(each)]
    fds = array.array("i", mine).tobytes()

    def flood() -> None:
        for _ in range(messages):
            raw.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
            stream.read_available()

    with pytest.raises(BadMessage, match="descriptors"):
        flood()
    stream.close()
    raw.close()
    for descriptor in mine:
        os.close(descriptor)
    assert descriptors() == before


def test_an_oversized_frame_is_refused_when_it_is_announced(
    pair: tuple[FrameStream, FrameStream],
) -> None:
    sender, receiver = pair
    sender.queue_raw(struct.pack("!I", limits.STREAM_FRAME + 1))
    sender.flush()
    receiver.read_available()
    with pytest.raises(TooLarge, match=str(limits.STREAM_FRAME)):
        receiver.take_frame()


def test_the_largest_frame_arrives(pair: tuple[FrameStream, FrameStream]) -> None:
    sender, receiver = pair
    payload = os.urandom(limits.STREAM_FRAME)
    sender.queue_frame(payload)
    frames: list[bytes] = []
    for _ in range(100):
        sender.flush()
        frames += receive(receiver)
    assert frames == [payload]


def test_a_peer_that_never_reads_is_noticed(pair: tuple[FrameStream, FrameStream]) -> None:
    sender, _ = pair
    before = descriptors()
    frames = 0

    def send_for_ever() -> None:
        nonlocal frames
        for frames in range(10_000):
            sender.queue_frame(b"x" * 1000, os.dup(0) if frames % 100 == 0 else None)
            sender.flush()

    with pytest.raises(StreamClosed, match="unread"):
        send_for_ever()
    # The kernel's buffer and ours, not more.
    buffer = sender.sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    assert frames * 1000 < limits.STREAM_BACKLOG + 2 * buffer
    sender.close()
    assert descriptors() <= before


def test_the_backlog_counts_what_was_sent(pair: tuple[FrameStream, FrameStream]) -> None:
    sender, receiver = pair
    for _ in range(10 * limits.STREAM_BACKLOG // 10_000):
        sender.queue_frame(b"x" * 10_000)
        while sender.has_unsent:
            sender.flush()
            receive(receiver)


def test_closing_releases_everything() -> None:
    before = descriptors()
    sender, receiver = make_pair()
    sender.queue_frame(b"arrives", marked_descriptor(b"unclaimed"))
    sender.flush()
    receiver.read_available()
    sender.queue_frame(b"never sent", marked_descriptor(b"unsent"))
    sender.queue_frame(b"never sent", marked_descriptor(b"unsent"))
    for stream in (sender, receiver):
        stream.close()
        stream.close()
    assert descriptors() == before


def test_the_end_of_the_peer_is_told_after_what_it_sent() -> None:
    sender, receiver = make_pair()
    sender.queue_frame(b"last words")
    sender.flush()
    sender.close()
    assert receive(receiver) == [b"last words"]
    with pytest.raises(StreamClosed):
        receiver.read_available()
    receiver.queue_frame(b"hello?")
    with pytest.raises(StreamClosed):
        receiver.flush()
    receiver.close()


def test_nothing_to_read_is_not_the_end(pair: tuple[FrameStream, FrameStream]) -> None:
    _, receiver = pair
    receiver.read_available()
    assert receiver.take_frame() is None
    assert receiver.take_preamble(8) is None
