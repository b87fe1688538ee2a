"""What is promised for a GPU: each target, and which figure of which result shows it.

The stages in ``gpu/`` measure against these, ``report/`` tells what came of them. FLUX.1-dev's
transformer, FLUX's VAE, CLIP-L and T5-XXL at full size, random weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from figures import Figure


@dataclass(frozen=True)
class Target:
    """``figure`` of ``benchmarks/results/<result>.json`` is at most ``limit``, or ``at_least``."""

    what: str
    result: str
    figure: str
    unit: str
    limit: float
    at_least: bool = False

    def measured(self, value: float) -> Figure:
        """The figure with what was measured."""
        return Figure(self.figure, value, self.unit, self.limit, self.at_least)

    @property
    def bound(self) -> str:
        """Its limit in words."""
        return f"{'≥' if self.at_least else '≤'} {self.limit:g} {self.unit}".strip()


HAND_OVER = Target(
    "hand-over of VAE, CLIP-L and T5-XXL (≈ 10 GB) that are on the GPU",
    *("gpu-sharing", "hand-over from the GPU", "ms", 50.0),
)
HAND_OVER_FROM_HOST = Target(
    "the same from ordinary host memory",
    *("gpu-sharing", "hand-over from pageable host memory", "s", 1.0),
)
ATTACH = Target(
    "attach in another process (CUDA IPC)",
    *("gpu-sharing", "attach in another process", "ms", 20.0),
)
LOADERS = Target(
    "restarted ComfyUI: nodes return usable VAE, CLIP and MODEL, slowest case",
    *("gpu-comfyui", "loaders after a restart", "s", 1.5),
)
LOADERS_READ = Target(
    "components that it read from disk",
    *("gpu-comfyui", "components read after a restart", "", 0.0),
)
COPIES = Target(
    "device memory of VAE, CLIP-L and T5-XXL, client and daemon together, contexts apart (NVML)",
    *("gpu-sharing", "device memory / bytes", "×", 1.005),
)
COPIES_IN_COMFYUI = Target(
    "device memory of all components, ComfyUI and daemon together, contexts apart (NVML)",
    *("gpu-comfyui", "device memory / bytes", "×", 1.005),
)
SERVICE = Target(
    "forward service against the same module in one process, 1024²",
    *("gpu-serving", "service to this process", "×", 1.01),
)
STOCK = Target(
    "step at 1024², bf16, compiled ranks: faster than stock ComfyUI in the same run",
    *("gpu-steps", "stock step / ranks' step", "×", 1.3, True),
)
STOCK_FP8 = Target(
    "the same with fp8 matmuls",
    *("gpu-steps", "stock step / ranks' step, fp8 matmuls", "×", 1.7, True),
)
FLOOR = Target(
    "step at 1024², bf16, against 74.4 TFLOP at the card's measured matrix rate",
    *("gpu-floor", "step / floor", "×", 1.4),
)
NEW_SIZE = Target(
    "first picture at a size not seen before, beyond later ones",
    *("gpu-sizes", "first picture at a new size, beyond later ones", "s", 2.0),
)
LOAD_WARM = Target(
    "load of the 23.8 GB file, page cache warm",
    *("gpu-load-file", "warm, 8 readers: seconds", "s", 6.0),
)
LOAD_COLD = Target(
    "load of the 23.8 GB file, page cache cold, against reading it alone",
    *("gpu-load-file", "cold load / reading the file", "×", 1.1),
)
LOAD_HOST_MEMORY = Target(
    "host memory that a rank takes for the transformer, in its bytes",
    *("gpu-load-file", "host memory of a rank / bytes of weights", "×", 0.05),
)
RANK_KILLED = Target(
    "rank killed until the next step is served (no file is there to be read)",
    *("gpu-serving", "rank killed until the next forward", "s", 10.0),
)
PROMPTS_DEVICE = Target(
    "300 prompts of 4 steps, mixed sizes, two clients: device memory grown",
    *("gpu-prompts", "device memory grown", "MiB", 64.0),
)
PROMPTS_HOST = Target(
    "… host memory of the daemon's processes grown",
    *("gpu-prompts", "host memory grown", "MiB", 128.0),
)
PROMPTS_ERRORS = Target("… errors", *("gpu-prompts", "errors", "", 0.0))
# By GPUs and pixels of a side; a step against one GPU's, both as fast as they can.
SPEED_UPS = {
    (gpus, side): Target(
        f"{gpus} GPUs at {side}²: faster than one",
        *("gpu-several", f"{gpus} GPUs at {side}²: speed-up", "×", least, True),
    )
    for gpus, side, least in ((2, 1024, 1.7), (2, 2048, 1.85), (4, 1024, 2.7), (4, 2048, 3.3))
}

TARGETS = (
    *(HAND_OVER, HAND_OVER_FROM_HOST, ATTACH, LOADERS, LOADERS_READ, COPIES, COPIES_IN_COMFYUI),
    *(SERVICE, STOCK, STOCK_FP8, FLOOR, NEW_SIZE, LOAD_WARM, LOAD_COLD, LOAD_HOST_MEMORY),
    *(RANK_KILLED, PROMPTS_DEVICE, PROMPTS_HOST, PROMPTS_ERRORS, *SPEED_UPS.values()),
)
