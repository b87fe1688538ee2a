"""Objects that ComfyUI's own loaders made, moved into regions of the daemon."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher

from ..protocol import messages as m
from ..protocol.client.attachment import Attachment
from ..protocol.client.fill import RegionWriter
from ..protocol.fingerprint import fingerprint_tensors
from ..protocol.manifest import lay_out
from ..protocol.regions.views import describe_tensors
from .link import Link, stop_if_interrupted
from .local_loading import CannotBeShared
from .shared_patcher import SharedPatcher, patchers_of
from .shared_weights import ENCODERS, SharedWeights, device_name

_SECONDS = 600.0
# Files for FLUX.1 lack it, it is not used, and ComfyUI leaves in it whatever the memory held: with
# it in the digest no two would be the same.
_WITHOUT_VALUE = {f"{ENCODERS['clip_l']}text_projection.weight"}


def share_vae(link: Link, vae: Any) -> Any:
    """The VAE object, now on shared weights."""
    vae.throw_exception_if_invalid()
    module = vae.first_stage_model
    _check(vae.patcher, "VAE")
    if not renew_shared(link, module):
        _share(link, module, {"vae": ""}, vae.device)
    return vae


def share_clip(link: Link, clip: Any) -> Any:
    """The CLIP object, now on shared weights; its patches (LoRAs) and hooks stay with it."""
    module = clip.cond_stage_model
    _check(clip.patcher, "CLIP")
    if not renew_shared(link, module):
        names = [name for name, _ in module.named_parameters()]
        found = {r: p for r, p in ENCODERS.items() if any(n.startswith(p) for n in names)}
        if not found:
            raise CannotBeShared("this CLIP has neither CLIP-L nor T5: it cannot be shared")
        _share(link, module, found, clip.patcher.load_device)
    return clip


def renew_shared(link: Link, module: torch.nn.Module) -> bool:
    """Whether a module is shared: then with the daemon of today, which may have been restarted.

    Raises SidecarError.
    """
    shared = SharedWeights.of(module)
    if shared is not None:
        shared.renew(partial(link.client.renew, should_cancel=stop_if_interrupted))
        SharedPatcher.take_over(module)  # also what was made of it since then
    return shared is not None


def _check(patcher: Any, what: str) -> None:
    """Have the plain weights in the module. Raises CannotBeShared."""
    probe = getattr(patcher, "is_dynamic", None)
    if probe is not None and probe():
        raise CannotBeShared(
            f"this {what} lies in ComfyUI's dynamic VRAM, which cannot be shared: load it with "
            f"Load {what} (xDiT), or start ComfyUI with --disable-dynamic-vram"
        )
    for found in patchers_of(patcher.model):
        if type(found) not in (ModelPatcher, SharedPatcher):
            raise CannotBeShared(
                f"the loader of this {what} looks after its weights in a way of its own "
                f"({type(found).__name__}): load it with Load {what} (xDiT)"
            )
        found.unpatch_model(None)


def _share(
    link: Link, module: torch.nn.Module, roles: Mapping[str, str], device: torch.device
) -> None:
    """Each role's parameters are those whose names begin with its prefix; all of them, or none."""
    attachments = [
        (_hand_over(link, module, role, prefix, device), prefix) for role, prefix in roles.items()
    ]
    shared = SharedWeights(module)
    for attachment, prefix in attachments:
        shared.adopt(attachment, prefix)
    SharedPatcher.take_over(module)


def _hand_over(
    link: Link, module: torch.nn.Module, role: str, prefix: str, device: torch.device
) -> Attachment:
    tensors = {
        name.removeprefix(prefix): parameter.data
        for name, parameter in module.named_parameters()
        if name.startswith(prefix) and name not in _WITHOUT_VALUE
    }
    if (twin := _find_twin(link, tensors, role, device_name(device))) is not None:
        return twin
    component = m.Component(
        fingerprint=fingerprint_tensors(tensors),
        role=role,
        label=f"{role} of a workflow",
        tensors=lay_out(describe_tensors(tensors)),
    )
    return link.client.hand_over(
        component,
        device_name(device),
        partial(_fill, tensors),
        timeout=_SECONDS,
        should_cancel=stop_if_interrupted,
    )


def _find_twin(
    link: Link, tensors: Mapping[str, torch.Tensor], role: str, device: str
) -> Attachment | None:
    """What is resident already and the same to the bit, under whatever fingerprint.

    A file's is not made of its bytes, so that a digest of them does not find what a loader of files
    handed over.
    """
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    for component in link.client.status().components:
        if (component.role, component.device) != (role, device) or component.nbytes < nbytes:
            continue
        attachment = link.client.attach(component.fingerprint, device)
        if attachment is None:  # another user's, or not filled yet
            continue
        views = attachment.tensors()
        if all(name in views and _same(views[name], each) for name, each in tensors.items()):
            return attachment
        attachment.release()
    return None


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """As bytes: fp8 cannot be compared everywhere, and NaN is not equal to itself."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    flat = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return torch.equal(flat[0], flat[1].to(flat[0].device))


def _fill(tensors: Mapping[str, torch.Tensor], writer: RegionWriter) -> None:
    writer.copy_tensors(tensors)
