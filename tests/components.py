"""Small components for tests."""

from __future__ import annotations

import hashlib

import torch
from xdit_sidecar.protocol.client.fill import RegionWriter
from xdit_sidecar.protocol.messages import Component
from xdit_sidecar.protocol.regions.views import describe_tensors


def random_tensors(seed: int = 0, count: int = 6) -> dict[str, torch.Tensor]:
    """Different dtypes and shapes; one channels_last, one empty, one scalar, two tied."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"block.{i}.weight": torch.randn(33 + i, 17, generator=generator).to(dtype)
        for i, dtype in zip(
            range(count), [torch.float32, torch.bfloat16, torch.float16] * count, strict=False
        )
    }
    conv = torch.randn(8, 4, 3, 3, generator=generator)
    tensors["conv.weight"] = conv.to(memory_format=torch.channels_last)
    tensors["scale"] = torch.tensor(3.5)
    tensors["nothing"] = torch.empty(0, 4)
    tensors["tied"] = tensors["block.0.weight"]
    return tensors


def describe(tensors: dict[str, torch.Tensor], label: str = "test.safetensors") -> Component:
    """A component of these tensors, with a fingerprint of their bytes."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(name.encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return Component(
        fingerprint=f"bytes:{digest.hexdigest()}",
        role="vae",
        label=label,
        tensors=describe_tensors(tensors),
    )


def must_not_fill(writer: RegionWriter) -> None:
    """A fill callback for those who are to attach."""
    raise AssertionError("this client was told to fill")
