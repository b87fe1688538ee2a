"""One forward of the diffusion model: ComfyUI's ``diffusion_model`` call."""

from __future__ import annotations

from ....protocol import messages as m
from ....protocol.tensors import digest_tensor
from ..denoiser import Conditioning, DenoiserOptions
from .base import Engines, Place, Run, Tensors, require

_REFERENCE = "ref_latents."


class ForwardRun(Run):
    """See :class:`~.base.Run`; done in one turn."""

    def __init__(self, job: m.Forward, tensors: Tensors, place: Place, engines: Engines) -> None:
        self._engines = engines
        self._x, self._timestep, context = require(tensors, "x", "timestep", "context")
        references = sorted(
            (int(name.removeprefix(_REFERENCE)), name)
            for name in tensors
            if name.startswith(_REFERENCE)
        )
        self._conditioning = Conditioning(
            context=context,
            y=tensors.get("y"),
            guidance=tensors.get("guidance"),
            ref_latents=[tensors[name] for _, name in references],
            name=_name(job, tensors),
        )
        self._options = DenoiserOptions(
            session=place.session,
            region=place.region("transformer"),
            compute=job.compute,
            fp8_matmul=job.fp8_matmul,
            degrees=job.degrees,
            adapters=place.loras(job.adapters),
            run=job.run,
            reference_method=job.ref_latents_method,
        )

    def advance(self) -> Tensors:
        """The prediction, "output" (B, C_out, H, W), in the compute dtype."""
        denoiser = self._engines.denoiser
        output = denoiser.predict(self._options, self._x, self._timestep, self._conditioning)
        return {"output": output}


def _name(job: m.Forward, tensors: Tensors) -> str:
    """What tells this conditioning from any other, where something is kept for it."""
    if job.degrees is None or job.degrees.pipefusion == 1:
        return ""
    parts = {part.name: part.digest for part in job.tensors}
    names = sorted(n for n in parts if n in ("context", "y") or n.startswith(_REFERENCE))
    return b"".join(parts[name] or digest_tensor(tensors[name]) for name in names).hex()
