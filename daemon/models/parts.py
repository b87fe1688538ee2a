"""Which parts of FLUX.1 a weights file holds: one, or all of them as in a whole checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from ...protocol.errors import UnsupportedModel
from ...protocol.manifest import TensorSpec
from ...protocol.safetensors_file import SafetensorsFile
from .flux_detection import detect_flux
from .lora_layout import read_layout
from .text_encoder_detection import detect_clip, detect_t5
from .vae_detection import detect_vae

TRANSFORMER, VAE, CLIP_L, T5, LORA = ROLES = ("transformer", "vae", "clip_l", "t5", "lora")


class Part(NamedTuple):
    """A component that a file holds: the names of its tensors begin with ``prefix``."""

    role: str
    prefix: str


def find_parts(file: SafetensorsFile, role: str | None = None) -> list[Part]:
    """The parts in a file, in the order of :data:`ROLES`; with ``role`` that one alone.

    Reads nothing but the header. Raises UnsupportedModel: what the file is, and what is supported.
    """
    specs = [tensor.spec for tensor in file.tensors]
    found, refusals = [], []
    for name in ROLES if role is None else (role,):
        try:
            found.append(Part(name, _DETECTORS[name](specs, file.label)))
        except UnsupportedModel as error:
            refusals.append(error)
    if not found:
        raise _most_telling(refusals)
    return found


def _most_telling(refusals: Sequence[UnsupportedModel]) -> UnsupportedModel:
    """A part that is incomplete was meant; otherwise the transformer's view of the file."""
    texts = [str(refusal) for refusal in refusals]
    return UnsupportedModel(next((text for text in texts if " incomplete " in text), texts[0]))


def _lora(specs: Sequence[TensorSpec], label: str) -> str:
    read_layout({spec.name: spec.shape for spec in specs}, label)
    return ""


_DETECTORS: dict[str, Callable[[Sequence[TensorSpec], str], str]] = {
    TRANSFORMER: lambda specs, label: detect_flux(specs, label).prefix,
    VAE: lambda specs, label: detect_vae(specs, label).prefix,
    CLIP_L: lambda specs, label: detect_clip(specs, label).prefix,
    T5: lambda specs, label: detect_t5(specs, label).prefix,
    LORA: _lora,
}
