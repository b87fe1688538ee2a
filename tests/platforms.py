"""The device under test: host memory, CUDA through the fake driver, or a real GPU.

Tests that take the ``platform`` fixture run on each; the real GPU only where
``XDIT_TEST_REAL_CUDA=1`` says so, and then instead of the fake.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from fake_cuda.build import fake_libcuda
from xdit_sidecar.protocol.regions.cuda_driver import LIBRARY_VARIABLE, CudaDriver

REAL_CUDA = os.environ.get("XDIT_TEST_REAL_CUDA") == "1"
PLATFORMS = ["cpu", "real-cuda" if REAL_CUDA else "fake-cuda"]


@dataclass
class Platform:
    """``option`` is for ``serve --device``, ``device`` the protocol's name of the device."""

    name: str
    option: str
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def device(self) -> str:
        return "cpu" if self.option == "cpu" else CudaDriver.load().device_uuid(0)

    @property
    def kind(self) -> str:
        return "memfd" if self.option == "cpu" else "cuda_ipc"


def make_platform(name: str, directory: Path) -> Platform:
    """The platform and the environment in which every process of a test must run."""
    if name == "cpu":
        return Platform(name, "cpu")
    if name == "real-cuda":
        # ComfyUI's default allocator: the clients must work under it.
        return Platform(name, "cuda", {"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"})
    return Platform(
        name,
        "cuda",
        {
            LIBRARY_VARIABLE: fake_libcuda(),
            "FAKE_CUDA_STATE": str(directory / "fake-cuda-state"),
            "FAKE_CUDA_MEMORY": str(8 << 30),
        },
    )
