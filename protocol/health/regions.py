"""Does a region work on a device: allocated, seen from both sides, freed?"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator

from .. import limits
from .. import messages as m
from ..client.client import Client
from ..client.deadline import Deadline, ShouldCancel
from ..client.fill import OpenFill
from ..errors import DeadlineExceeded, OutOfMemory, RegionUnavailable, SidecarError
from ..manifest import TensorSpec
from ..regions.cuda_driver import CudaError, CudaUnavailable
from ..regions.table import process_regions
from .check import Finding, failed, passed, skipped, warning
from .units import human_bytes, human_ms
from .visit import MemoryCost, Visit

_NBYTES = limits.REGION_GRANULE
_NONCE_BYTES = 32
_OFFSET = _NBYTES - limits.PROBE  # near the end: all of the region must be there

_RESTART = "the output of `xdit-sidecar serve` names the cause; then restart the daemon"
_HANGS = (
    "the daemon ends and restarts a keeper that stays silent for 10 s; if this comes back look "
    "at `dmesg` for GPU faults (Xid)"
)
_NAMESPACES = (
    "run ComfyUI and the daemon on the same host with the same driver, and in containers with "
    "`--pid=host --ipc=host --gpus all`"
)
_ROOM = (
    "close clients or unload models that hold components (`xdit-sidecar status` names them), or "
    "give the daemon a larger --budget or a smaller --reserve"
)


class RegionBroken(Exception):
    """A region does not do what it is for; the text says what."""


def probe_device(visit: Visit, device: str, seconds: float) -> Finding:
    """Prove a region on ``device`` within ``seconds``; leaves what it cost in ``visit.memory``."""
    status = visit.fresh_status()
    facts = next(found for found in status.devices if found.device == device)
    if facts.state != "ready":
        return failed(
            f"the keeper is {facts.state}" + (f": {facts.error}" if facts.error else ""),
            "wait for it: `xdit-sidecar ipc health-check --wait ready`"
            if facts.state == "starting"
            else _RESTART,
        )
    deadline = Deadline(seconds, visit.should_cancel)
    # A client of its own: whatever goes wrong, the region ends with its session.
    with Client(visit.endpoints.directory, name="health-check") as client:
        probe = _RegionProbe(client, facts, deadline, visit.should_cancel)
        try:
            detail = probe.run()
        except DeadlineExceeded:
            return failed(
                f"{probe.doing}: no answer within {seconds:.1f} s from the keeper "
                f"(pid {facts.keeper_pid}) or a rank",
                _HANGS,
            )
        except OutOfMemory as error:
            return failed(f"{probe.doing}: {error}", _ROOM)
        except RegionUnavailable as error:
            return failed(f"{probe.doing}: {error}", _NAMESPACES)
        except (SidecarError, CudaError, CudaUnavailable, RegionBroken) as error:
            return failed(f"{probe.doing}: {error}", _RESTART)
    visit.memory[device] = probe.cost
    return passed(detail)


def check_memory(visit: Visit, device: str) -> Finding:
    """What the probe's region cost, and whether the memory came back."""
    cost = visit.memory.get(device)
    if cost is None:
        return skipped("needs a region that works")
    free = (
        f"free {human_bytes(cost.before)} before, {human_bytes(cost.during)} with it, "
        f"{human_bytes(cost.after)} after"
    )
    detail = (
        f"a region of {human_bytes(cost.nbytes)} cost {human_bytes(cost.before - cost.during)} "
        f"({free})"
    )
    if device == "cpu":
        return passed(f"{detail}; what other processes did meanwhile is in these numbers")
    if cost.context > cost.nbytes:
        detail += f"; the CUDA context of one process costs {human_bytes(cost.context)}"
    if cost.before - cost.after > cost.nbytes // 2:
        return warning(
            f"{detail}: {human_bytes(cost.before - cost.after)} did not come back",
            "run the check again: another process may have allocated meanwhile; if it stays so "
            "restart the daemon and report it",
        )
    return passed(f"{detail}; it came back")


class _RegionProbe:
    """One device's probe, step by step; ``doing`` is the step for the error text."""

    def __init__(
        self,
        client: Client,
        facts: m.DeviceStatus,
        deadline: Deadline,
        should_cancel: ShouldCancel | None,
    ) -> None:
        self._client = client
        self._device = facts.device
        self._deadline = deadline
        self._should_cancel = should_cancel
        self.doing = "allocating a region"
        self.cost = MemoryCost(_NBYTES, 0, 0, 0, 0)

    def run(self) -> str:
        """Everything, in order; a sentence about it."""
        # The first region has this process make its CUDA context, so that the second one shows
        # what a region alone costs. Ranks make theirs during the third.
        first_during, before = self._measure()
        during, after = self._measure()
        self.cost = MemoryCost(_NBYTES, before, during, after, first_during + _NBYTES - before)
        fill, fingerprint = self._open()
        seen = [f"{reader} {human_ms(took)}" for reader, took in self._exchange_nonces(fill)]
        self._free(fill, fingerprint)
        return (
            f"{human_bytes(_NBYTES)} allocated, written here and read there and the other way "
            f"round ({', '.join(seen)}), freed"
        )

    def _measure(self) -> tuple[int, int]:
        """Free bytes of the device with a region and after it; the keeper looks both times."""
        fill, fingerprint = self._open()
        during = self._status()[0].free
        self._free(fill, fingerprint)
        return during, self._status()[0].free

    def _open(self) -> tuple[OpenFill, str]:
        self.doing = "allocating and opening a region"
        fingerprint = f"nonce:{secrets.token_hex(32)}"
        component = m.Component(
            fingerprint=fingerprint,
            role="probe",
            label="health-check",
            tensors=[TensorSpec("probe", "U8", [_NBYTES])],
        )
        fill = self._client.open_fill(
            component,
            self._device,
            timeout=self._deadline.remaining,
            should_cancel=self._should_cancel,
        )
        return fill, fingerprint

    def _free(self, fill: OpenFill, fingerprint: str) -> None:
        self.doing = "freeing the region"
        with fill:
            pass  # left without commit: abandoned
        # Device memory comes back only when the last process has closed it.
        process_regions.collect(max(0.0, self._deadline.remaining))
        self._deadline.next_wait(self.doing)
        if any(component.fingerprint == fingerprint for component in self._status()[1]):
            raise RegionBroken("the daemon still lists the region that was given back")

    def _status(self) -> tuple[m.DeviceStatus, list[m.ComponentStatus]]:
        status = self._client.status(timeout=self._deadline.remaining)
        device = next(found for found in status.devices if found.device == self._device)
        return device, status.components

    def _exchange_nonces(self, fill: OpenFill) -> Iterator[tuple[str, float]]:
        """(reader, seconds for both directions) for the keeper and each ready rank."""
        assert fill.writer is not None  # noqa: S101  it was just opened
        mapping = fill.writer.mapping
        ranks = [
            f"rank{rank.rank}"
            for rank in self._client.status(timeout=self._deadline.remaining).ranks
            if rank.device == self._device and rank.state == "ready"
        ]
        for reader in ["keeper", *ranks]:
            begin = time.perf_counter()
            self.doing = f"writing here and reading as {reader}"
            ours, theirs = os.urandom(_NONCE_BYTES), os.urandom(_NONCE_BYTES)
            mapping.write(_OFFSET, ours)
            mapping.synchronize()
            if fill.probe(reader, offset=_OFFSET, length=_NONCE_BYTES) != ours:
                raise RegionBroken(f"{reader} does not see what this process wrote")
            self.doing = f"writing as {reader} and reading here"
            fill.probe(reader, offset=_OFFSET, length=_NONCE_BYTES, write=theirs)
            if mapping.read(_OFFSET, _NONCE_BYTES) != theirs:
                raise RegionBroken(f"this process does not see what {reader} wrote")
            yield reader, time.perf_counter() - begin
