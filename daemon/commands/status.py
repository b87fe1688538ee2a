"""``xdit-sidecar status``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from ...protocol import messages as m
from ...protocol.client.client import Client
from ...protocol.client.deadline import Deadline
from ...protocol.errors import SidecarError
from ...protocol.health.units import human_age, human_bytes
from ...protocol.health.verdict import judge
from . import exit_status
from .console import make_console, make_table
from .options import Json, RuntimeDir
from .watch import watch_status

_BAR = 16  # characters
_SHOWN_DIGEST = 12  # digits of a fingerprint


def status_command(
    watch: Annotated[
        bool, typer.Option("--watch", help="Show it again and again, until Ctrl-C.")
    ] = False,
    every: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.1, max=3600, help="With --watch: how often.")
    ] = 1.0,
    json: Json = False,
    runtime_dir: RuntimeDir = None,
) -> None:
    """What is resident, where, how big, and who shares it.

    Exit status: 0 healthy, 1 a device or rank failed or the daemon refuses, 2 wrong usage,
    3 no daemon. With --watch 0, and a daemon that is gone is waited for.
    """
    if watch:
        watch_status(runtime_dir, every, json=json)
        return
    try:
        with Client(runtime_dir, name="status") as client:
            status = client.status()
            own = client.session(Deadline(1.0)).welcome.session
    except SidecarError as error:
        if not json:
            raise
        typer.echo(msgspec.json.encode({"error": {"code": error.code, "message": str(error)}}))
        raise typer.Exit(exit_status.of_error(error)) from None
    if json:
        typer.echo(msgspec.json.encode(status))
    else:
        print_status(make_console(), status, own)
    failed = judge(status) == "degraded"
    raise typer.Exit(exit_status.FAILED if failed else exit_status.HEALTHY)


def print_status(console: Console, status: m.Status, own: str | None = None) -> None:
    """Tables for people. ``own`` is the session that asked, which is left out."""
    for part in describe_status(status, own, bars=console.is_terminal):
        console.print(part, highlight=False)


def describe_status(
    status: m.Status, own: str | None = None, *, bars: bool = False
) -> Iterator[Table | str]:
    """The parts of a status from top to bottom, with ``bars`` for what is being loaded."""
    yield (
        f"xdit-sidecar {status.daemon}, protocol {status.protocol}, pid {status.pid}, "
        f"uid {status.uid}, up {human_age(status.uptime_seconds)}"
    )
    if status.no_gpu:
        yield f"no GPU is served: {status.no_gpu}"
    sessions = [session for session in status.sessions if session.session != own]
    tables = [_devices(status.devices), _components(status, bars=bars), _sessions(sessions)]
    if status.group is not None:
        tables.append(_ranks(status.ranks, status.group))
    for table in tables:
        yield ""
        yield table
        if not table.row_count:
            yield "none"
    for rank in status.ranks:
        for told in rank.transformers:
            yield f"rank {rank.rank}: {describe_transformer(told)}"
    if status.group is not None and status.group.by_nccl:
        yield f"ranks exchange by NCCL, not by copy engines: {status.group.by_nccl}"
    for session in sessions:
        for line in session.meaning:
            yield f"{session.session}: {line}"


def describe_transformer(told: m.TransformerStatus) -> str:
    """How its forwards run, and why not otherwise, in a line."""
    reason = f" ({told.reason})" if told.reason else ""
    products = " with fp8 products" if told.fp8_matmul else ""
    lora = ", with LoRA" if told.lora else ""
    how = f"{told.compute}{products}{lora}: {told.state}{reason}{_recorded(told)}"
    return f"{told.label}, {how}"


def _recorded(told: m.TransformerStatus) -> str:
    if told.not_recorded:
        return f", not recorded ({told.not_recorded})"
    return f", {told.recorded} recorded" if told.recorded else ""


def _devices(devices: list[m.DeviceStatus]) -> Table:
    table = make_table(
        "Devices",
        *("device", "name", "state", ">regions", ">orphaned", ">budget", ">free", ">total"),
        *(">keeper", "error"),
    )
    for device in devices:
        sizes = (device.regions, device.orphaned, device.budget, device.free, device.total)
        table.add_row(
            device.device,
            device.name,
            device.state,
            *map(human_bytes, sizes),
            str(device.keeper_pid or "-"),
            device.error or "",
        )
    return table


def _components(status: m.Status, *, bars: bool) -> Table:
    users = {s.session: f"{s.session}({s.hello.host or s.hello.name})" for s in status.sessions}
    table = make_table(
        "Components", "role", "label", "device", ">size", "state", "shared by", ">idle", "content"
    )
    for component in status.components:
        sharers = ", ".join(users.get(name, name) for name in component.sessions)
        idle = component.idle_seconds
        kind, _, digest = component.fingerprint.partition(":")
        table.add_row(
            component.role,
            component.label,
            component.device,
            human_bytes(component.nbytes),
            _state(component, bar=bars),
            sharers or "nobody",
            "" if idle is None else human_age(idle),
            f"{kind}:{digest[:_SHOWN_DIGEST]}",
        )
    return table


def _state(component: m.ComponentStatus, *, bar: bool) -> str:
    if component.state == "filling" and component.filled:
        done = min(1.0, component.filled / component.nbytes)
        drawn = "━" * int(done * _BAR)
        return f"filling {int(done * 100)} %" + (f" {drawn:─<{_BAR}}" if bar else "")
    return component.state


def _sessions(sessions: list[m.SessionStatus]) -> Table:
    table = make_table(
        "Sessions",
        *("session", "who", ">pid", ">uid", "torch", "allocator", "dynamic VRAM", ">leases"),
        ">age",
    )
    for session in sessions:
        hello = session.hello
        vram = {None: "", True: "on", False: "off"}[hello.dynamic_vram]
        table.add_row(
            session.session,
            hello.host or hello.name,
            str(session.pid),
            str(session.uid),
            hello.torch or "-",
            hello.allocator or "-",
            vram,
            str(session.leases),
            human_age(session.age_seconds),
        )
    return table


def _ranks(ranks: list[m.RankStatus], group: m.GroupStatus) -> Table:
    title = f"Ranks: {group.state}, {group.backend}, {group.jobs} jobs"
    table = make_table(title, ">rank", "device", ">pid", "state", ">starts", ">copies", "error")
    for rank in ranks:
        table.add_row(
            str(rank.rank),
            rank.device,
            str(rank.pid or "-"),
            rank.state,
            str(rank.starts),
            human_bytes(rank.copied),
            rank.error or "",
        )
    return table
