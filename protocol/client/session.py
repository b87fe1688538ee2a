"""The client's end of a session: the stream, its reader thread, and a pool of ZeroMQ sockets."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import zmq

from .. import codec, limits
from ..endpoints import Endpoints, zmq_address
from ..errors import (
    BadMessage,
    DaemonAbsent,
    DaemonLost,
    NotAllowed,
    SidecarError,
    VersionMismatch,
    error_from_code,
)
from ..frames import FrameStream, StreamClosed
from ..messages import (
    Descriptor,
    Hello,
    Refused,
    RegionOrphaned,
    StreamMessage,
    Welcome,
)
from ..peers import peer_of
from ..version import (
    PREAMBLE_BYTES,
    PROTOCOL_VERSION,
    NotOurProtocol,
    ProtocolVersion,
    decode_preamble,
    encode_preamble,
    explain_mismatch,
)
from .deadline import Deadline
from .scratch import ScratchPool

Channel = zmq.Socket[bytes]
SessionEnd = tuple[type[SidecarError], str]  # of what is raised about it
_CONNECT_SLICE = struct.pack("ll", 0, 50_000)  # struct timeval, 50 ms


class ChannelPool:
    """ZeroMQ sockets of one session and endpoint. Each caller has one to itself while it waits.

    A channel whose answer was not awaited is discarded, so that a late answer meets nobody.
    """

    def __init__(self, context: zmq.Context[Channel], path: Path, queue: int, limit: int) -> None:
        self._context = context
        self._path = path
        self._queue = queue
        self._limit = limit
        self._lock = threading.Lock()
        self._idle: list[Channel] = []
        self._closed: SessionEnd | None = None

    @contextlib.contextmanager
    def channel(self) -> Iterator[Channel]:
        """A connected DEALER for the length of the block."""
        with self._lock:
            if self._closed is not None:
                kind, text = self._closed
                raise kind(text)
            channel = self._idle.pop() if self._idle else None
        if channel is None:
            channel = self._context.socket(zmq.DEALER)
            channel.linger = 0
            channel.maxmsgsize = self._limit
            channel.sndhwm = channel.rcvhwm = self._queue
            channel.sndbuf = limits.SOCKET_BUFFER
            channel.connect(zmq_address(self._path))
        try:
            yield channel
        except BaseException:
            channel.close()
            raise
        self._put_back(channel)

    def _put_back(self, channel: Channel) -> None:
        with self._lock:
            if self._closed is not None:
                channel.close()
            else:
                self._idle.append(channel)

    def close(self, why: SessionEnd) -> None:
        """Close the idle channels now and busy ones when they come back; ``why`` for late ones."""
        with self._lock:
            self._closed = why
            for channel in self._idle:
                channel.close()
            self._idle.clear()


class ClientSession:
    """One open session. Ends when the stream does; then :attr:`lost` is set and stays so."""

    def __init__(
        self,
        stream: FrameStream,
        welcome: Welcome,
        daemon: ProtocolVersion,
        context: zmq.Context[Channel],
        endpoints: Endpoints,
        on_orphaned: Callable[[str], None],
    ) -> None:
        self.welcome = welcome
        self.daemon_version = daemon
        self.daemon_peer = peer_of(stream.sock)
        self.lost = threading.Event()
        self._why_lost: SessionEnd = (DaemonLost, "the session is closed")
        self.control = ChannelPool(
            context, endpoints.control, limits.CONTROL_QUEUE, limits.CONTROL_FRAME
        )
        self.bulk = ChannelPool(context, endpoints.bulk, limits.BULK_QUEUE, limits.BULK_FRAME)
        self.scratches = ScratchPool(daemon)
        self._stream = stream
        self._on_orphaned = on_orphaned
        self._descriptors: dict[int, tuple[int, int]] = {}  # number -> descriptor, request
        self._withdrawn: deque[int] = deque(maxlen=limits.REQUESTS_IN_FLIGHT * 8)
        self._arrived = threading.Condition()
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC)
        self._thread = threading.Thread(
            target=self._read_stream, name="xdit-sidecar-session", daemon=True
        )
        self._thread.start()

    @classmethod
    def open(
        cls,
        endpoints: Endpoints,
        hello: Hello,
        context: zmq.Context[Channel],
        deadline: Deadline,
        on_orphaned: Callable[[str], None],
    ) -> ClientSession:
        """Connect and be welcomed. Raises DaemonAbsent, NotAllowed, VersionMismatch, Busy…"""
        stream = FrameStream(_connect(endpoints, deadline))
        try:
            stream.queue_raw(encode_preamble())
            stream.queue_frame(codec.encode(hello))
            with contextlib.suppress(StreamClosed):
                stream.flush()  # refused at once; the reason can still be read
            preamble = _await(stream, lambda: stream.take_preamble(PREAMBLE_BYTES), deadline)
            version = decode_preamble(preamble)
            # A daemon of another major version refuses now; that message never changes.
            frame = _await(stream, stream.take_frame, deadline)
            message: StreamMessage = codec.decode(frame, StreamMessage, limit=limits.STREAM_FRAME)
            if isinstance(message, Refused):
                raise error_from_code(message.code, message.message)
            if (mismatch := explain_mismatch(version, PROTOCOL_VERSION)) is not None:
                raise VersionMismatch(mismatch)
            if not isinstance(message, Welcome):
                raise BadMessage("the daemon answered the hello with something else")
            return cls(stream, message, version, context, endpoints, on_orphaned)
        except NotOurProtocol as error:
            stream.close()
            raise BadMessage(f"{endpoints.session}: {error}; something else listens") from None
        except BaseException:
            stream.close()
            raise

    @property
    def why_lost(self) -> SidecarError:
        """A new exception each time.

        A raised one holds the frames that it passed, and with them tensors and leases of callers.
        """
        kind, text = self._why_lost
        return kind(text)

    def take_descriptor(self, number: int, deadline: Deadline) -> int:
        """The file descriptor that an answer named, now the caller's."""
        with self._arrived:
            # It is sent ahead of the answer, so it is here already or comes now.
            while number not in self._descriptors:
                if self.lost.is_set():
                    raise self.why_lost
                self._arrived.wait(deadline.next_wait("waiting for a file descriptor"))
            return self._descriptors.pop(number)[0]

    def forget_request(self, request: int) -> None:
        """Nobody waits for this request any more: close what came with its answer, or will."""
        with self._arrived:
            self._withdrawn.append(request)
            for number, (descriptor, asked) in list(self._descriptors.items()):
                if asked == request:
                    os.close(descriptor)
                    del self._descriptors[number]

    def close(self) -> None:
        """End the session: every lease ends with it. Safe to call twice, and from any thread."""
        with self._arrived:
            if not self.lost.is_set():
                # The reader closes the stream first and the ZeroMQ sockets afterwards.
                os.write(self._wake_write, b"x")
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # --- the reader thread

    def _read_stream(self) -> None:
        poller = select.poll()
        poller.register(self._stream, select.POLLIN)
        poller.register(self._wake_read, select.POLLIN)
        try:
            while self._wake_read not in (fd for fd, _ in poller.poll()):
                self._stream.read_available()
                while (frame := self._stream.take_frame()) is not None:
                    self._received(codec.decode(frame, StreamMessage, limit=limits.STREAM_FRAME))
        except StreamClosed:
            self._why_lost = (
                DaemonLost,
                "the daemon ended the session: it stopped, restarted or crashed; what is mapped "
                "stays usable, and the next call connects again",
            )
        except SidecarError as error:
            self._why_lost = (type(error), str(error))
        finally:
            self._end()

    def _received(self, message: StreamMessage) -> None:
        match message:
            case Descriptor(number, request):
                descriptor = self._stream.take_descriptor()
                with self._arrived:
                    if request and request in self._withdrawn:
                        os.close(descriptor)
                    else:
                        self._descriptors[number] = (descriptor, request)
                        self._arrived.notify_all()
            case RegionOrphaned(region):
                self._on_orphaned(region)
            case Refused(code, text):
                raise error_from_code(code, text)
            case _:
                raise BadMessage("the daemon sent something that does not belong on this stream")

    def _end(self) -> None:
        self._stream.close()
        self.control.close(self._why_lost)
        self.bulk.close(self._why_lost)
        self.scratches.close()
        with self._arrived:
            self.lost.set()
            for descriptor, _ in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()
            self._arrived.notify_all()
            os.close(self._wake_read)
            os.close(self._wake_write)


def _connect(endpoints: Endpoints, deadline: Deadline) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # A full backlog (a flood, a stopped daemon) makes connect wait, in the kernel's queue and so in
    # its turn; this bounds each wait and leaves the socket usable for the next.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _CONNECT_SLICE)
    try:
        while True:
            try:
                sock.connect(str(endpoints.session))
                break
            except BlockingIOError:
                deadline.next_wait("connecting")
    except SidecarError:
        sock.close()
        raise
    except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
        sock.close()
        raise DaemonAbsent(
            f"no xdit-sidecar daemon answers in {endpoints.directory}: start it with "
            "`xdit-sidecar serve`, or name its "
            "directory with XDIT_SIDECAR_RUNTIME_DIR"
        ) from None
    except PermissionError:
        sock.close()
        raise NotAllowed(
            f"uid {os.geteuid()} may not open {endpoints.session}: the daemon belongs to another "
            "account; start one of your own"
        ) from None
    except OSError as error:
        sock.close()
        raise DaemonAbsent(f"connecting to {endpoints.session} failed: {error}") from None
    return sock


def _await(stream: FrameStream, take: Callable[[], bytes | None], deadline: Deadline) -> bytes:
    """Read until ``take`` gives something."""
    poller = select.poll()
    poller.register(stream, select.POLLIN)
    while (data := take()) is None:
        if poller.poll(deadline.next_wait("connecting") * 1000):
            try:
                stream.read_available()
            except StreamClosed:
                raise DaemonLost(
                    "the daemon closed the connection during the handshake; its log says why"
                ) from None
    return data
