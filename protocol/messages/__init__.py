"""Every message of the protocol, as typed structures.

A request and its answer are paired by ``id`` inside an envelope; :class:`Failed` may answer any
request. Adding an optional field or a new member is a minor version; anything else is a major one.

Handles, tokens and file descriptors are in here and nowhere else: the structures that carry them
hide them from ``repr``, so that they never reach a log.
"""

from __future__ import annotations

from .components import Component as Component
from .components import RegionGrant as RegionGrant
from .control import Abandon as Abandon
from .control import Attach as Attach
from .control import Attached as Attached
from .control import CancelRequest as CancelRequest
from .control import Commit as Commit
from .control import Done as Done
from .control import Evict as Evict
from .control import Failed as Failed
from .control import Fill as Fill
from .control import Filling as Filling
from .control import FillProgress as FillProgress
from .control import GetStatus as GetStatus
from .control import HandOver as HandOver
from .control import OpenScratch as OpenScratch
from .control import Ping as Ping
from .control import Pong as Pong
from .control import Probe as Probe
from .control import Probed as Probed
from .control import Release as Release
from .control import ScratchOpened as ScratchOpened
from .control import failed_answer as failed_answer
from .envelopes import Answer as Answer
from .envelopes import AnswerBody as AnswerBody
from .envelopes import BulkBody as BulkBody
from .envelopes import BulkRequest as BulkRequest
from .envelopes import Echo as Echo
from .envelopes import Envelope as Envelope
from .envelopes import Request as Request
from .envelopes import RequestBody as RequestBody
from .envelopes import RequestId as RequestId
from .fields import Bytes as Bytes
from .fields import Compile as Compile
from .fields import Count as Count
from .fields import Device as Device
from .fields import Fingerprint as Fingerprint
from .fields import LeaseId as LeaseId
from .fields import Message as Message
from .fields import Name as Name
from .fields import RegionId as RegionId
from .fields import RegionKind as RegionKind
from .fields import Role as Role
from .fields import Text as Text
from .fields import Token as Token
from .jobs import IN_SCRATCH as IN_SCRATCH
from .jobs import Adapter as Adapter
from .jobs import Adapters as Adapters
from .jobs import Components as Components
from .jobs import ComputeDtype as ComputeDtype
from .jobs import Decode as Decode
from .jobs import Degrees as Degrees
from .jobs import Digest as Digest
from .jobs import Encode as Encode
from .jobs import EncodeText as EncodeText
from .jobs import Forward as Forward
from .jobs import Generate as Generate
from .jobs import Job as Job
from .jobs import Need as Need
from .jobs import Output as Output
from .jobs import Parts as Parts
from .jobs import RefLatentsMethod as RefLatentsMethod
from .jobs import Step as Step
from .jobs import TensorPart as TensorPart
from .jobs import scratch_of as scratch_of
from .status import ComponentStatus as ComponentStatus
from .status import DeviceStatus as DeviceStatus
from .status import GroupStatus as GroupStatus
from .status import RankStatus as RankStatus
from .status import SessionStatus as SessionStatus
from .status import Status as Status
from .status import TransformerStatus as TransformerStatus
from .stream import Descriptor as Descriptor
from .stream import Hello as Hello
from .stream import Refused as Refused
from .stream import RegionOrphaned as RegionOrphaned
from .stream import StreamMessage as StreamMessage
from .stream import Welcome as Welcome
from .tasks import CloseTask as CloseTask
from .tasks import CompileTask as CompileTask
from .tasks import DropTask as DropTask
from .tasks import NextTask as NextTask
from .tasks import Opened as Opened
from .tasks import OpenedRegion as OpenedRegion
from .tasks import OpenTask as OpenTask
from .tasks import Outcome as Outcome
from .tasks import ProbeTask as ProbeTask
from .tasks import ScratchGrant as ScratchGrant
from .tasks import Task as Task
from .tasks import TrimTask as TrimTask
from .tasks import TurnTask as TurnTask
