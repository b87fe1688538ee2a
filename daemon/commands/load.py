"""``xdit-sidecar load`` and ``xdit-sidecar unload``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from ...protocol import messages as m
from ...protocol.client.client import Client
from ...protocol.errors import InUse, SidecarError, UnknownComponent
from ...protocol.health.units import human_bytes
from ..models.parts import CLIP_L, LORA, T5, TRANSFORMER, VAE
from . import exit_status
from .console import make_console
from .options import Json, RuntimeDir
from .residence import make_resident, work_devices

_LEAST_DIGITS = 6  # of a fingerprint


class Role(StrEnum):
    """What ``--role`` takes: :data:`ROLES`."""

    TRANSFORMER = TRANSFORMER
    VAE = VAE
    CLIP_L = CLIP_L
    T5 = T5
    LORA = LORA


class LoadedPart(msgspec.Struct):
    """One line of ``load``. Sizes in bytes."""

    role: str
    label: str
    device: str
    fingerprint: str
    nbytes: int
    bytes_read: int


def load_command(
    file: Annotated[Path, typer.Argument(help="A .safetensors file, as ComfyUI has it.")],
    role: Annotated[
        Role | None,
        typer.Option(help="Load this part alone. [default: all that the file has]"),
    ] = None,
    device: Annotated[
        list[str] | None,
        typer.Option(metavar="cpu|UUID", help="Where to. [default: wherever the ranks work]"),
    ] = None,
    json: Json = False,
    runtime_dir: RuntimeDir = None,
) -> None:
    """Make a weights file resident, so that nobody has to wait for it.

    FLUX.1 transformers, VAEs, CLIP-L and T5 text encoders, LoRAs, or a checkpoint with several of
    them. It stays until it is unloaded or nobody uses it and room is needed. Exit status: 0 it is
    resident, 1 it is not, 2 wrong usage, 3 no daemon.
    """
    console = make_console()
    loaded = []
    try:
        with Client(runtime_dir, name="load") as client:
            devices = _check_served(client, device) if device else work_devices(client)
            for found in make_resident(client, file, devices, role=role, console=console):
                with found.attachment as held:
                    part = LoadedPart(
                        found.role,
                        held.component.label,
                        held.device,
                        held.component.fingerprint,
                        held.nbytes,
                        found.bytes_read,
                    )
                loaded.append(part)
                if not json:
                    how = "loaded" if part.bytes_read else "was resident already"
                    console.print(
                        f"{part.role}: {part.label} on {part.device}, {human_bytes(part.nbytes)}, "
                        f"{how}",
                        highlight=False,
                        markup=False,
                    )
    except SidecarError as error:
        if not json:
            raise
        typer.echo(msgspec.json.encode({"error": {"code": error.code, "message": str(error)}}))
        raise typer.Exit(exit_status.of_error(error)) from None
    if json:
        typer.echo(msgspec.json.encode({"components": loaded}))


def unload_command(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME]...",
            help="A component's file name, role or fingerprint (its beginning is enough).",
            show_default=False,
        ),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="All components that nobody uses.")
    ] = False,
    runtime_dir: RuntimeDir = None,
) -> None:
    """Free components that nobody uses.

    Exit status: 0 they are gone, 1 one is in use or unknown, 2 wrong usage, 3 no daemon.
    """
    if bool(names) == everything:
        raise typer.BadParameter("name what to unload, or give --all")
    console = make_console()
    with Client(runtime_dir, name="unload") as client:
        status = client.status()
        resident = [c for c in status.components if c.state == "resident"]
        chosen = [c for c in resident if not c.sessions] if everything else []
        for name in names or []:
            matching = [c for c in resident if _is_meant(name, c.label, c.role, c.fingerprint)]
            if not matching:
                shown = ", ".join(sorted({c.label for c in resident})) or "nothing"
                raise UnknownComponent(
                    f"no resident component is called {name!r}; resident: {shown}"
                )
            chosen += matching
        for component in chosen:
            _check_unused(component, status.sessions)
        for component in {(c.fingerprint, c.device): c for c in chosen}.values():
            client.evict(component.fingerprint, component.device)
            console.print(
                f"{component.role}: {component.label} on {component.device}, "
                f"{human_bytes(component.nbytes)} freed",
                highlight=False,
                markup=False,
            )
        if everything and not chosen:
            console.print("nothing that is resident is unused")


def _check_served(client: Client, devices: list[str]) -> list[str]:
    served = [device.device for device in client.status().devices]
    for device in devices:
        if device not in served:
            raise typer.BadParameter(
                f"--device {device}: the daemon does not serve it; it serves {', '.join(served)}"
            )
    return devices


def _check_unused(component: m.ComponentStatus, sessions: list[m.SessionStatus]) -> None:
    """Raise InUse with the names of those who lease it, before anything is freed."""
    users = [s for s in sessions if s.session in component.sessions]
    if users:
        names = ", ".join(f"{s.hello.host or s.hello.name} (pid {s.pid})" for s in users)
        raise InUse(
            f"{component.label} on {component.device} is used by {names}: close them or let them "
            "drop the model, then unload it"
        )


def _is_meant(name: str, label: str, role: str, fingerprint: str) -> bool:
    digest = fingerprint.partition(":")[2]
    # As `status` shows it, or its digits alone.
    begun = len(name) >= _LEAST_DIGITS and (digest.startswith(name) or fingerprint.startswith(name))
    return name in (label, role) or begun
