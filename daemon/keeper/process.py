"""The keeper's loop: read a request, do it, answer."""

from __future__ import annotations

import argparse
import select
import signal
import socket
import sys

from ...protocol import codec, limits
from ...protocol.errors import Internal, SidecarError
from ...protocol.frames import FrameStream, StreamClosed
from ...protocol.regions.base import DeviceFacts, NotEnoughMemory, RegionOwner
from ...protocol.regions.cuda_driver import CudaError, CudaUnavailable
from ...protocol.regions.cuda_ipc import CudaIpcOwner
from ...protocol.regions.memfd import MemfdOwner
from ..child import die_with_parent
from . import messages as m
from .nvml import used_bytes

# CUresults after which every call of the context fails: uncorrectable ECC, illegal addresses and
# the other ways in which a kernel or the hardware ends it.
_STICKY = frozenset({214, *range(700, 720)})


def open_owner(device: str) -> RegionOwner:
    """The owner of regions on ``device``: "cpu" or a GPU's UUID."""
    if device == "cpu":
        return MemfdOwner()
    before = used_bytes(device)
    owner = CudaIpcOwner(device)
    after = used_bytes(device)
    if before is not None and after is not None:
        owner.context_bytes = max(0, after - before)
    return owner


def perform(owner: RegionOwner, body: object) -> tuple[m.KeeperAnswerBody, int | None]:
    """Do what a request asks. Returns the answer and the descriptor that rides on it."""
    match body:
        case m.DescribeDevice():
            return _report(owner.facts()), None
        case m.AllocateRegion(region, nbytes, reserve):
            facts = owner.facts()
            if nbytes + reserve > facts.free:
                return m.OutOfDeviceMemory(nbytes, max(0, facts.free - reserve), facts.total), None
            owner.allocate(region, nbytes)
            return _report(owner.facts()), None
        case m.ExportRegion(region):
            export = owner.export(region)
            answer = m.Exported(export.handle, export.descriptor is not None)
            return answer, export.descriptor
        case m.SealRegion(region):
            owner.seal(region)
            return m.KeeperDone(), None
        case m.FreeRegion(region):
            owner.free(region)
            return _report(owner.facts()), None
        case m.ReadRegion(region, offset, length):
            return m.RegionBytes(owner.read(region, offset, length)), None
        case m.WriteRegion(region, offset, data):
            owner.write(region, offset, data)
            return m.KeeperDone(), None
    raise Internal(f"the keeper does not know the request {type(body).__name__}")


class ContextLost(Exception):
    """The CUDA context is in a state in which nothing can be relied upon any more."""


def answer(owner: RegionOwner, body: object) -> tuple[m.KeeperAnswerBody, int | None]:
    """Like :func:`perform`, with every refusal as an answer instead of an exception.

    Raises :class:`ContextLost` when only a new process can help.
    """
    try:
        return perform(owner, body)
    except NotEnoughMemory as error:
        return m.OutOfDeviceMemory(error.needed, error.free, owner.facts().total), None
    except SidecarError as error:
        return m.KeeperFailed(error.code, str(error)), None
    except KeyError:
        return m.KeeperFailed("unknown-component", "the keeper has no such region"), None
    except CudaError as error:
        if error.code in _STICKY or isinstance(body, m.FreeRegion):
            raise ContextLost(str(error)) from None
        return m.KeeperFailed("internal", f"the keeper could not do it: {error}"), None
    except OSError as error:
        return m.KeeperFailed("internal", f"the keeper could not do it: {error}"), None


def serve(owner: RegionOwner, stream: FrameStream) -> None:
    """Answer the broker until it closes the channel.

    Nothing more is read while an answer is unsent, so that the answers never pile up here.
    """
    poller = select.poll()
    while True:
        poller.register(stream, select.POLLOUT if stream.has_unsent else select.POLLIN)
        poller.poll()
        try:
            stream.flush()
            if not stream.has_unsent:
                stream.read_available()
                _answer_waiting(owner, stream)
        except StreamClosed:
            return


def _answer_waiting(owner: RegionOwner, stream: FrameStream) -> None:
    while not stream.has_unsent and (frame := stream.take_frame()) is not None:
        request = codec.decode(frame, m.KeeperRequest, limit=limits.STREAM_FRAME)
        body, descriptor = answer(owner, request.body)
        stream.queue_frame(codec.encode(m.KeeperAnswer(request.id, body)), descriptor)
        stream.flush()


def _report(facts: DeviceFacts) -> m.DeviceReport:
    return m.DeviceReport(facts.name, facts.total, facts.free, facts.context)


def main() -> int:
    """Entry point of the keeper process."""
    parser = argparse.ArgumentParser(prog="xdit-sidecar-keeper")
    parser.add_argument("--device", required=True)
    parser.add_argument("--channel", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    arguments = parser.parse_args()
    die_with_parent(arguments.parent)
    # Ctrl-C, systemd and a closing terminal signal the whole group; the broker decides when
    # keepers end, and the kernel ends them with it.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    stream = FrameStream(socket.socket(fileno=arguments.channel), backlog=m.BACKLOG)
    try:
        owner = open_owner(arguments.device)
    except (CudaError, CudaUnavailable) as error:
        failed = m.KeeperAnswer(0, m.KeeperFailed("device-unavailable", str(error)))
        stream.queue_frame(codec.encode(failed))
        stream.flush()
        stream.close()
        return 1
    try:
        stream.queue_frame(codec.encode(m.KeeperAnswer(0, _report(owner.facts()))))
        serve(owner, stream)
        owner.close()
    except ContextLost as error:
        # The driver frees everything when the process ends; the broker starts another one.
        print(f"the keeper of {arguments.device} gives up: {error}", file=sys.stderr)
        return 1
    finally:
        stream.close()
    return 0
