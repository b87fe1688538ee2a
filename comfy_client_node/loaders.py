"""Stock VAE and CLIP objects of ComfyUI whose weights are shared through the daemon."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import comfy.sd
import torch

from ..protocol.errors import UnsupportedModel
from .link import Link
from .shared_patcher import SharedPatcher
from .shared_weights import ENCODERS, SharedWeights, fill_the_rest, read_shapes, share_file

_META = torch.device("meta")


class TextEncoderFile(NamedTuple):
    """One encoder: its file, and what the names of its tensors begin with there."""

    path: Path
    prefix: str = ""


def load_shared_vae(link: Link, path: Path, prefix: str = "") -> Any:
    """A ``comfy.sd.VAE``; no weight is copied or, if it is resident already, read.

    Raises SidecarError, UnsupportedModel for a VAE that ComfyUI does not know.
    """
    with _META:
        vae = comfy.sd.VAE(sd=read_shapes(path, prefix))
    vae.throw_exception_if_invalid()
    shared = SharedWeights(vae.first_stage_model)
    share_file(link, shared, path, role="vae", device=vae.device, file_prefix=prefix)
    fill_the_rest(vae.first_stage_model, vae.device)
    vae.patcher = SharedPatcher(vae.first_stage_model, vae.device)
    return vae


def load_shared_clip(
    link: Link,
    files: Sequence[TextEncoderFile],
    clip_type: Any,
    *,
    embeddings: Any,
    on_cpu: bool = False,
) -> Any:
    """A ``comfy.sd.CLIP`` of one or several encoders. Raises SidecarError, UnsupportedModel."""
    options: dict[str, Any] = {"initial_device": _META}
    if on_cpu:
        options["load_device"] = options["offload_device"] = torch.device("cpu")
    shapes = [read_shapes(file.path, file.prefix) for file in files]
    clip = comfy.sd.load_text_encoder_state_dicts(
        [dict(found) for found in shapes],
        embedding_directory=embeddings,
        clip_type=clip_type,
        model_options=options,
    )
    module = clip.cond_stage_model
    device = clip.patcher.load_device
    shared = SharedWeights(module)
    for file, found in zip(files, shapes, strict=True):
        role, target = _place(module, file, found)
        share_file(
            link,
            shared,
            file.path,
            role=role,
            device=device,
            file_prefix=file.prefix,
            module_prefix=target,
        )
    fill_the_rest(module, device)
    clip.patcher = SharedPatcher.of_clip(clip)
    return clip


def _place(
    module: torch.nn.Module, file: TextEncoderFile, shapes: Mapping[str, torch.Tensor]
) -> tuple[str, str]:
    """The role of an encoder, and where in the module its parameters are."""
    own = {name: value.shape for name, value in module.named_parameters()}
    for role, prefix in ENCODERS.items():
        matching = [name for name in shapes if own.get(prefix + name) == shapes[name].shape]
        if matching and len(matching) >= len(shapes) // 2:
            return role, prefix
    raise UnsupportedModel(
        f"{file.path.name!r} is no text encoder that can be shared: CLIP-L and T5 for FLUX.1 are "
        "(use ComfyUI's own loader for others)"
    )
