"""Which parts of FLUX.1 a weights file holds: one, or all of them as in a whole checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from ...protocol.errors import UnsupportedModel
from ...protocol.manifest import TensorSpec
from ...protocol.safetensors_file import SafetensorsFile
from .component_tensors import find_prefix, shorten_label
from .flux_detection import CHECKPOINT_PREFIX, detect_flux
from .lora_layout import read_layout
from .other_models import recognise_component, recognise_diffusion_model
from .text_encoder_detection import CLIP_PREFIXES, T5_PREFIXES, detect_clip, detect_t5
from .vae_detection import PREFIXES as VAE_PREFIXES
from .vae_detection import detect_vae

TRANSFORMER, VAE, CLIP_L, T5, LORA = ROLES = ("transformer", "vae", "clip_l", "t5", "lora")


class Part(NamedTuple):
    """A component that a file holds: the names of its tensors begin with ``prefix``."""

    role: str
    prefix: str


def find_parts(file: SafetensorsFile, role: str | None = None) -> list[Part]:
    """The parts in a file, in the order of :data:`ROLES`; with ``role`` that one alone.

    Reads nothing but the header. Raises UnsupportedModel: what the file is, and what is supported;
    also if one of several parts cannot be used.
    """
    specs = [tensor.spec for tensor in file.tensors]
    found, refusals = [], {}
    for name in ROLES if role is None else (role,):
        try:
            found.append(Part(name, _DETECTORS[name](specs, file.label)))
        except UnsupportedModel as error:
            refusals[name] = error
    if not found:
        raise _most_telling(refusals, [spec.name for spec in specs])
    for name, refusal in refusals.items():
        if find_prefix(specs, _PREFIXES.get(name, ())):
            roles = ", ".join(part.role for part in found)
            raise UnsupportedModel(f"{refusal}. What else it has can be loaded by role: {roles}")
    return found


def _most_telling(
    refusals: Mapping[str, UnsupportedModel], names: Sequence[str]
) -> UnsupportedModel:
    """The view of the part that the file was meant to be; if that is not known the first one."""
    kind = recognise_diffusion_model(names) or recognise_component(names) or ""
    meant = next((role for start, role in _KINDS.items() if kind.startswith(start)), "")
    return refusals.get(meant) or next(iter(refusals.values()))


def _lora(specs: Sequence[TensorSpec], label: str) -> str:
    label = shorten_label(label)
    if not read_layout({spec.name: spec.shape for spec in specs}, label).sources:
        raise UnsupportedModel(
            f"{label} is no LoRA for FLUX.1's transformer: it has tensors for text encoders only"
        )
    return ""


# How the names of a part begin in whole checkpoints.
_PREFIXES: Mapping[str, Sequence[str]] = {
    TRANSFORMER: (CHECKPOINT_PREFIX,),
    VAE: VAE_PREFIXES,
    CLIP_L: CLIP_PREFIXES,
    T5: T5_PREFIXES,
}
# What :mod:`.other_models` calls a file begins with → the part that tells more about it.
_KINDS = {
    "a VAE": VAE,
    "a text encoder (CLIP)": CLIP_L,
    "a text encoder (T5)": T5,
    "a LoRA": LORA,
}
_DETECTORS: dict[str, Callable[[Sequence[TensorSpec], str], str]] = {
    TRANSFORMER: lambda specs, label: detect_flux(specs, label).prefix,
    VAE: lambda specs, label: detect_vae(specs, label).prefix,
    CLIP_L: lambda specs, label: detect_clip(specs, label).prefix,
    T5: lambda specs, label: detect_t5(specs, label).prefix,
    LORA: _lora,
}
