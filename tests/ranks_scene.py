"""A daemon with ranks on the CPU, tiny FLUX.1 files, and clients that have them computed with."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import flux_files
import torch
from daemon_process import DaemonProcess, running_daemon
from flux_files import Flux
from flux_inputs import Inputs, comfy_inputs, run_diffusers
from safetensors.torch import save_file
from xdit_sidecar.daemon.models.flux_detection import detect_flux_file
from xdit_sidecar.daemon.ranks.flux.model import build_flux
from xdit_sidecar.protocol import messages as m
from xdit_sidecar.protocol.client.attachment import Attachment
from xdit_sidecar.protocol.client.client import Client
from xdit_sidecar.protocol.client.remote import RemoteRanks
from xdit_sidecar.protocol.component_file import ComponentFile, hand_over_file
from xdit_sidecar.protocol.safetensors_file import SafetensorsFile

SMALL = Flux(heads=4)
# A forward of a larger picture with it takes a second on a CPU.
LARGE = Flux(heads=4, head_size=64, double=4, single=8)
EXACT = 2e-5  # outputs are about 1; fp32 summed in another order


def wait_until(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Return when it is so; AssertionError if it takes longer."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"{what}: not within {seconds} s"
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def maps(pid: int, name: str = "xdit-sidecar") -> int:
    """How many regions in host memory, or others of this name, a process has mapped."""
    return Path(f"/proc/{pid}/maps").read_text().count(f"memfd:{name}")


@dataclass
class FluxFile:
    """A FLUX.1 file of its own, and what diffusers makes of it in this process."""

    flux: Flux
    path: Path

    @classmethod
    def write(
        cls, path: Path, flux: Flux = SMALL, *, seed: int = 0, dtype: str = "F32", **how: str
    ) -> FluxFile:
        """Random weights as a file keeps them."""
        flux_files.write(
            path, flux_files.store(flux_files.random_weights(flux, seed), dtype, **how)
        )
        return cls(flux, path)

    def hand_over(self, client: Client, *, reads: bool | None = None) -> Attachment:
        """Resident on "cpu". ``reads``: whether weights are to be read from the file."""
        with SafetensorsFile.open(self.path) as file:
            config = detect_flux_file(file)
            component = ComponentFile(file, role="transformer", prefix=config.prefix)
            attachment = hand_over_file(client, component, "cpu")
        if reads is not None:
            assert bool(component.bytes_read) == reads
        return attachment

    @cached_property
    def config(self):
        with SafetensorsFile.open(self.path) as file:
            return detect_flux_file(file)

    @cached_property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        return {name: view.clone() for name, view in flux_files.map_file(self.path)[0].items()}

    def alone(self, inputs: Inputs, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """One process's forward."""
        given = {
            name: value if name in ("timestep", "guidance") else value.to(dtype)
            for name, value in inputs.items()
        }
        return run_diffusers(build_flux(self.config, dict(self.tensors), dtype).model, given)


@dataclass
class User:
    """A client, its ranks, and a component that it leases."""

    client: Client
    ranks: RemoteRanks
    held: Attachment

    @property
    def fingerprint(self) -> str:
        return self.held.component.fingerprint

    def job(self, **more: object) -> m.Forward:
        """A forward of the component that this user leases."""
        fields = {"components": {"transformer": self.fingerprint}, "compute": "F32", **more}
        return m.Forward(tensors=[], **fields)  # type: ignore[arg-type]

    def forward(
        self, inputs: Inputs, *, job: m.Forward | None = None, **more: object
    ) -> torch.Tensor:
        """The prediction."""
        tensors = dict(inputs)
        if "ref_latent" in tensors:
            tensors["ref_latents.0"] = tensors.pop("ref_latent")
        return self.ranks.run(job or self.job(), tensors, **more)["output"]  # type: ignore[arg-type]

    @contextlib.contextmanager
    def lora(self, path: Path, tensors: dict[str, torch.Tensor]) -> Iterator[str]:
        """The fingerprint of a LoRA, written to ``path`` and handed over."""
        save_file(tensors, path)
        with SafetensorsFile.open(path) as file:
            held = hand_over_file(self.client, ComponentFile(file, role="lora"), "cpu")
        try:
            yield held.component.fingerprint
        finally:
            held.release()


@dataclass
class RanksScene:
    """A running daemon whose ranks are ready."""

    daemon: DaemonProcess
    directory: Path
    files: dict[str, FluxFile] = field(default_factory=dict)

    def file(self, name: str, flux: Flux = SMALL, **how: object) -> FluxFile:
        """The file of this name, written once."""
        if name not in self.files:
            path = self.directory / f"{name}.safetensors"
            self.files[name] = FluxFile.write(path, flux, **how)  # type: ignore[arg-type]
        return self.files[name]

    @contextlib.contextmanager
    def user(self, file: FluxFile | None = None, name: str = "user") -> Iterator[User]:
        """A client with a component of its own to compute with."""
        with self.daemon.client(name) as client:
            ranks = RemoteRanks(client)
            held = (file or self.file("small")).hand_over(client)
            try:
                yield User(client, ranks, held)
            finally:
                held.release()

    @property
    def status(self) -> m.Status:
        with self.daemon.client("looker") as client:
            return client.status()

    @property
    def group(self) -> m.GroupStatus:
        group = self.status.group
        assert group is not None
        return group

    @property
    def rank_pids(self) -> list[int]:
        pids = [rank.pid for rank in self.status.ranks]
        assert all(pids)
        return [pid for pid in pids if pid]

    @property
    def starts(self) -> int:
        """How often the group was started."""
        return self.status.ranks[0].starts

    def wait_until_ready(self, starts: int = 1) -> None:
        """The ranks wait for work, after so many starts of the group."""
        self.daemon.wait_for_status(
            lambda s: s.group.state == "ready" and s.ranks[0].starts >= starts, 90
        )

    def wait_until_idle(self) -> None:
        """Nothing waits and nothing runs."""
        self.daemon.wait_for_status(lambda s: s.group.jobs == 0, 60)


@contextlib.contextmanager
def running_ranks(
    directory: Path, ranks: int, *options: str, environment: Mapping[str, str] | None = None
) -> Iterator[RanksScene]:
    """A daemon with so many ranks, for the length of the block."""
    directory.mkdir(exist_ok=True)
    with running_daemon(
        directory, "--ranks", str(ranks), *options, environment=environment
    ) as daemon:
        scene = RanksScene(daemon, directory)
        try:
            scene.wait_until_ready()
            yield scene
        finally:
            if os.environ.get("XDIT_TEST_SHOW_LOG"):
                print(daemon.log)


def some_inputs(seed: int = 1, batch: int = 1) -> Inputs:
    """A forward of SMALL that takes some hundredths of a second."""
    return comfy_inputs(SMALL, height=64, width=64, text=16, batch=batch, seed=seed)
