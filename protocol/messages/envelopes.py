"""What every message over ZeroMQ is wrapped in: who asks, and which request an answer is for."""

from __future__ import annotations

import msgspec

from .control import (
    Abandon,
    Attach,
    Attached,
    CancelRequest,
    Commit,
    Done,
    Evict,
    Failed,
    Fill,
    Filling,
    FillProgress,
    GetStatus,
    HandOver,
    OpenScratch,
    Ping,
    Pong,
    Probe,
    Probed,
    Release,
    ScratchOpened,
)
from .fields import Count, Message, Token
from .jobs import Decode, Encode, EncodeText, Forward, Generate, Need, Output, Step
from .status import Status
from .tasks import (
    CloseTask,
    CompileTask,
    DropTask,
    NextTask,
    OpenTask,
    ProbeTask,
    TrimTask,
    TurnTask,
)


class Echo(Message, frozen=True, tag="echo"):
    """Send the raw frames back unchanged: the health-check's measure of the bulk path."""


RequestBody = (
    Ping
    | HandOver
    | Attach
    | FillProgress
    | Commit
    | Abandon
    | Release
    | Evict
    | Probe
    | OpenScratch
    | GetStatus
    | CancelRequest
)
BulkBody = Echo | Forward | Generate | Decode | Encode | EncodeText | CancelRequest | NextTask
AnswerBody = (
    Pong
    | Fill
    | Filling
    | Attached
    | ScratchOpened
    | Done
    | Probed
    | Failed
    | Status
    | Output
    | Step
    | Need
    | ProbeTask
    | OpenTask
    | CloseTask
    | TurnTask
    | DropTask
    | CompileTask
    | TrimTask
)


class Envelope(msgspec.Struct, frozen=True):
    """Of a request: whose session it belongs to and what its answer is called by."""

    token: Token
    id: Count


class Request(Envelope, frozen=True):
    """Over the control socket: one frame."""

    body: RequestBody

    def __repr__(self) -> str:
        return f"Request(id={self.id}, body={self.body!r}, token=<hidden>)"


class BulkRequest(Envelope, frozen=True):
    """First frame of a message over the bulk socket; raw frames follow."""

    body: BulkBody

    def __repr__(self) -> str:
        return f"BulkRequest(id={self.id}, body={self.body!r}, token=<hidden>)"


class RequestId(msgspec.Struct, frozen=True):
    """What can still be read of a request that is not understood, so that its answer finds it."""

    id: Count = 0


class Answer(msgspec.Struct, frozen=True):
    """Over either socket; on the bulk socket raw frames follow."""

    id: Count
    body: AnswerBody
