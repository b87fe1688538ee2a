"""What the way to the ranks and back costs a forward: the service against the same module here."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch
from daemon_process import running_daemon
from figures import Figure, percentile
from flux_files import Flux
from flux_inputs import comfy_inputs, run_diffusers
from ranks_scene import FluxFile
from xdit_sidecar.daemon.ranks.flux.model import build_flux
from xdit_sidecar.protocol.client.remote import RemoteRanks

# As little to compute as there can be for latents of 1024² pixels, which travel in full.
_MODEL = Flux(heads=1, head_size=16, double=1, single=0, channels=64, inputs=64, context=64)
_LATENT = 128
_FORWARDS = 200


def measure() -> list[Figure]:
    """The median of differences between neighbours, so that the machine's moods cancel out."""
    torch.set_num_threads(1)
    inputs = comfy_inputs(_MODEL, height=_LATENT, width=_LATENT, text=32, batch=1)
    with (
        tempfile.TemporaryDirectory() as name,
        running_daemon(Path(name), "--ranks", "1") as daemon,
    ):
        file = FluxFile.write(Path(name, "flux.safetensors"), _MODEL)
        with daemon.client("bench") as client:
            remote = RemoteRanks(client)
            remote.wait_until_ready()
            held = file.hand_over(client)
            model = build_flux(file.config, file.tensors, torch.float32).model
            job = file_job(held.component.fingerprint)
            overheads, there = [], []
            for _ in range(_FORWARDS):
                began = time.perf_counter()
                run_diffusers(model, inputs)
                middle = time.perf_counter()
                remote.run(job, inputs)
                end = time.perf_counter()
                there.append((end - middle) * 1e3)
                overheads.append((end - middle - (middle - began)) * 1e3)
            held.release()
    return [
        Figure("forward of 1024² latents by a rank, p50", percentile(there, 50), "ms"),
        Figure("of that broker and protocol, p50", percentile(overheads, 50), "ms", 3.0),
    ]


def file_job(fingerprint: str):
    """A forward of that transformer in fp32."""
    from xdit_sidecar.protocol.messages import Forward

    return Forward(components={"transformer": fingerprint}, tensors=[], compute="F32")
