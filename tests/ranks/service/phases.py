"""What clients have going at the moment when something dies: each phase, brought to its midst."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import components
import torch
from flux_inputs import comfy_inputs
from ranks.components import component_files
from ranks.service.test_fairness import picture
from ranks_scene import EXACT, LARGE, RanksScene, User, maps, wait_until
from safetensors.torch import save_file
from xdit_sidecar.protocol import messages as m
from xdit_sidecar.protocol.client.attachment import Attachment
from xdit_sidecar.protocol.client.client import Client
from xdit_sidecar.protocol.client.fill import RegionWriter
from xdit_sidecar.protocol.component_file import ComponentFile, hand_over_file
from xdit_sidecar.protocol.errors import SidecarError
from xdit_sidecar.protocol.safetensors_file import SafetensorsFile

Tensor = torch.Tensor

_PATIENCE = 90.0  # seconds for a call to end at all
# What is to take a while does so long on this machine, and on a loaded one is no hang yet.
_AWHILE = 1.2  # seconds
_SIDES = {"forward": 64, "decode": 64, "small decode": 8}  # of latents, at least
_STEPS = 1_000  # of a picture that never ends by itself
_QUIET = 0.5  # seconds without a step: the turn is another client's
_COMPUTED = 0.1  # seconds that ranks have computed: they are in the midst of it


class Background:
    """A call in a thread, and how it ended."""

    def __init__(self, call: Callable[[], Tensor], expected: Tensor | None = None) -> None:
        self.error: SidecarError | None = None
        self.output: Tensor | None = None
        self.ended = 0.0
        self._expected = expected
        self._thread = threading.Thread(target=self._work, args=(call,))
        self._thread.start()

    def _work(self, call: Callable[[], Tensor]) -> None:
        try:
            self.output = call()
        except SidecarError as error:
            self.error = error
        self.ended = time.monotonic()

    def wait_until_computing(self, scene: RanksScene, jobs: int = 1) -> None:
        """Returns when the ranks are in the middle of it, and so many jobs are there."""
        wait_until(lambda: scene.group.jobs == jobs, 10, "the job was not begun")
        before = cpu_seconds(scene.rank_pids)
        wait_until(
            lambda: cpu_seconds(scene.rank_pids) > before + _COMPUTED, 30, "nothing is computed"
        )
        assert not self.ended, f"too short for this test: {self.error}"

    def join(self, seconds: float) -> None:
        """AssertionError if it takes longer."""
        self._thread.join(seconds)
        assert not self._thread.is_alive(), "the client hangs"

    def check_output(self) -> None:
        """It ended as if nothing had happened."""
        self.join(_PATIENCE)
        assert self.output is not None, self.error
        if self._expected is not None:
            torch.testing.assert_close(self.output, self._expected, rtol=0, atol=EXACT)


def cpu_seconds(pids: list[int]) -> float:
    """What processes have computed so far, together."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class VaeFile:
    """A tiny VAE's file."""

    path: Path

    @classmethod
    def write(cls, path: Path) -> VaeFile:
        save_file(component_files.random_weights(component_files.SmallVae().shapes(), 1), path)
        return cls(path)

    def hand_over(self, client: Client, *, reads: bool | None = None) -> Attachment:
        """Resident on "cpu". ``reads``: whether weights are to be read from the file."""
        with SafetensorsFile.open(self.path) as file:
            component = ComponentFile(file, role="vae")
            attachment = hand_over_file(client, component, "cpu")
        if reads is not None:
            assert bool(component.bytes_read) == reads
        return attachment


@dataclass
class Clients:
    """Three clients of one daemon: with a FLUX.1, with a VAE, and with a picture that waits."""

    scene: RanksScene
    user: User
    decoder: User
    drawer: User
    vae: VaeFile
    filled: threading.Event = field(default_factory=threading.Event)  # a fill may go on
    expected: dict[str, Tensor] = field(default_factory=dict)
    sides: dict[str, int] = field(default_factory=lambda: dict(_SIDES))
    _late: Attachment | None = None

    @classmethod
    @contextmanager
    def of(cls, scene: RanksScene) -> Iterator[Clients]:
        """With what everything is expected to come to, computed before anything dies."""
        vae = VaeFile.write(scene.directory / "vae.safetensors")
        large = scene.file("large", LARGE)
        with (
            scene.user(large) as user,
            scene.user(vae, name="decoder") as decoder,
            scene.user(name="drawer") as drawer,
        ):
            clients = cls(scene, user, decoder, drawer, vae)
            clients._choose_sides()
            clients.expected = {
                "small forward": large.alone(comfy_inputs(LARGE)),
                "forward": clients.forward(),
                **{name: clients.decode(name) for name in ("decode", "small decode")},
            }
            clients.check()
            yield clients

    def _choose_sides(self) -> None:
        for name, call in (("forward", self.forward), ("decode", self.decode)):
            call()  # the first does more
            began = time.monotonic()
            call()
            longer = _AWHILE / (time.monotonic() - began)
            self.sides[name] = 8 * round(_SIDES[name] * max(1.0, math.sqrt(longer)) / 8)

    @property
    def users(self) -> list[User]:
        return [self.user, self.decoder, self.drawer]

    @property
    def sessions(self) -> list[str]:
        """Their names, all of them alive."""
        found = [user.client._session for user in self.users]
        assert all(session is not None and not session.lost.is_set() for session in found)
        return [session.welcome.session for session in found if session is not None]

    def check(self) -> None:
        """They are served, rightly, and no byte of a file is read again."""
        files = (self.scene.file("large"), self.vae, self.scene.file("small"))
        for user, file in zip(self.users, files, strict=True):
            file.hand_over(user.client, reads=False).release()
        found = {
            "small forward": self.user.forward(comfy_inputs(LARGE)),
            "small decode": self.decode("small decode"),
        }
        for name, output in found.items():
            torch.testing.assert_close(output, self.expected[name], rtol=0, atol=10 * EXACT)

    def renew(self, seconds: float | None = None) -> None:
        """Move to new regions, as ComfyUI does when it is told, or when the daemon is new."""
        for user in self.users:
            assert seconds is None or user.held.orphaned.wait(seconds), "nobody told"
            old, user.held = user.held, user.client.renew(user.held)
            old.release()

    # --- what they do

    def forward(self) -> Tensor:
        """A forward of a while."""
        side = self.sides["forward"]
        inputs = comfy_inputs(LARGE, height=side, width=side, text=64, batch=2)
        return self.user.forward(inputs, timeout=_PATIENCE)

    def decode(self, name: str = "decode") -> Tensor:
        """A decode of a while, or a small one."""
        generator, side = torch.Generator().manual_seed(1), self.sides[name]
        latent = torch.randn((1, 16, side, side), generator=generator)
        components = {"vae": self.decoder.fingerprint}
        job = m.Decode(components=components, tensors=[], compute="F32")
        return self.decoder.ranks.run(job, {"latent": latent}, timeout=_PATIENCE)["image"]

    # --- phases

    def begin(self, phase: str, rank: int | None = None) -> list[Background]:
        """What is in the midst of it when this returns. ``rank``: the one that is to die."""
        match phase:
            case "idle":
                return []
            case "loading":
                return [self._fill() if rank is None else self._open(rank)]
            case "waiting":
                return self._wait()
        work = Background(getattr(self, phase), self.expected[phase])
        work.wait_until_computing(self.scene)
        return [work]

    def _wait(self) -> list[Background]:
        """A picture was begun and waits for the end of another client's forward."""
        heard = [time.monotonic()]
        job, tensors = picture(self.drawer, _STEPS)

        def draw() -> Tensor:
            outputs = self.drawer.ranks.run(
                job, tensors, on_step=lambda *_: heard.append(time.monotonic()), timeout=_PATIENCE
            )
            return outputs["latent"]

        drawing = Background(draw)
        wait_until(lambda: len(heard) > 2, 30, "the picture was not begun")
        forward = Background(self.forward)
        wait_until(lambda: time.monotonic() - heard[-1] > _QUIET, 30, "the picture does not wait")
        forward.wait_until_computing(self.scene, jobs=2)
        return [drawing, forward]

    def _fill(self) -> Background:
        """A hand-over that has written half of its bytes; ``filled`` lets it go on."""
        tensors, half = components.random_tensors(3), threading.Event()
        self.filled.clear()

        def fill(writer: RegionWriter) -> None:
            writer.write(0, b"\xff" * 1_000)
            half.set()
            assert self.filled.wait(_PATIENCE)
            writer.copy_tensors(tensors)

        def hand_over() -> Tensor:
            client, component = self.user.client, components.describe(tensors)
            held = client.hand_over(component, "cpu", fill, timeout=_PATIENCE)
            weight = held.tensors()["conv.weight"].clone()
            held.release()
            client.evict_soon(component.fingerprint, "cpu")
            return weight

        work = Background(hand_over, tensors["conv.weight"])
        assert half.wait(10)
        return work

    def _open(self, rank: int) -> Background:
        """A forward whose component the rank does not come to open: it is stopped."""
        pids, file = self.scene.rank_pids, self.scene.file("late", seed=5)
        self._late = file.hand_over(self.user.client)
        job = self.user.job(components={"transformer": self._late.component.fingerprint})
        other, before = pids[1 - rank], maps(pids[1 - rank])
        os.kill(pids[rank], signal.SIGSTOP)
        work = Background(lambda: self.user.forward(comfy_inputs(file.flux), job=job))
        wait_until(lambda: maps(other) > before, 10, "nothing is opened")
        return work

    def finish(self) -> None:
        """Let go of what a phase has left."""
        self.filled.set()
        if self._late is not None:
            late, self._late = self._late, None
            late.release()
            self.user.client.evict_soon(late.component.fingerprint, "cpu")
