"""LoRA patches of a ComfyUI model as components: the ranks compute them beside the weights."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch

from ..protocol import messages as m
from ..protocol.client.attachment import Attachment
from ..protocol.client.fill import RegionWriter
from ..protocol.manifest import lay_out
from ..protocol.regions.views import describe_tensors
from ..protocol.tensors import digest_tensor
from .link import Link, stop_if_interrupted
from .refusals import CannotBeRemote

_PREFIX = "diffusion_model."
_MOST_STACKS = 8  # whose components are kept leased


class _Layer(NamedTuple):
    """Patches that have one strength: LoRAs, or parts of them."""

    strength: float
    tensors: dict[str, torch.Tensor]  # in the ranks' layout: module.down, .up, .alpha


class _Stack(NamedTuple):
    adapters: list[m.Adapter]
    held: list[Attachment]


class LoraComponents:
    """Hands over what LoraLoader nodes have put into ``patcher.patches``; once per stack."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._stacks: OrderedDict[Any, _Stack] = OrderedDict()  # by patches_uuid

    def of(self, patcher: Any, devices: list[str]) -> list[m.Adapter]:
        """The adapters of a forward of this patcher.

        Raises CannotBeRemote for patches that are no low-rank pairs, SidecarError.
        """
        if not patcher.patches:
            return []
        key = patcher.patches_uuid
        if key not in self._stacks:
            self._stacks[key] = self._hand_over(patcher.patches, devices)
            while len(self._stacks) > _MOST_STACKS:
                _release(self._stacks.popitem(last=False)[1])
        self._stacks.move_to_end(key)
        return self._stacks[key].adapters

    def forget(self) -> None:
        """The daemon is another one, or has dropped them."""
        for stack in self._stacks.values():
            _release(stack)
        self._stacks.clear()

    def _hand_over(self, patches: Mapping[str, Any], devices: list[str]) -> _Stack:
        stack = _Stack([], [])
        try:
            for number, layer in enumerate(read_patches(patches)):
                component = _describe(layer, f"LoRA {number + 1} of ComfyUI")
                fill = partial(_fill, layer.tensors)
                for device in devices:
                    attachment = self._link.client.hand_over(
                        component, device, fill, should_cancel=stop_if_interrupted
                    )
                    stack.held.append(attachment)
                stack.adapters.append(m.Adapter(component.fingerprint, layer.strength))
        except BaseException:
            _release(stack)
            raise
        return stack


def read_patches(patches: Mapping[str, Any]) -> list[_Layer]:
    """ComfyUI's patches (key → list of (strength, adapter, model strength, offset, function)).

    Patches of one weight add up, so they are dealt out over layers, of one strength each.
    """
    layers: dict[tuple[int, float], dict[str, torch.Tensor]] = {}
    for key, entries in patches.items():
        module = key.removeprefix(_PREFIX).removesuffix(".weight")
        for number, (strength, adapter, model_strength, offset, function) in enumerate(entries):
            if model_strength != 1.0 or function is not None:
                raise CannotBeRemote(f"a merged or transformed weight ({key})")
            up, down, alpha = _read_pair(key, adapter)
            name = module + _rows(key, offset)
            tensors = layers.setdefault((number, float(strength)), {})
            if f"{name}.down" in tensors:
                raise CannotBeRemote(f"two patches of {key} that are not told apart")
            tensors[f"{name}.down"] = down
            tensors[f"{name}.up"] = up
            if alpha is not None:
                tensors[f"{name}.alpha"] = torch.tensor(float(alpha))
    return [_Layer(strength, tensors) for (_, strength), tensors in layers.items()]


def _read_pair(key: str, adapter: Any) -> tuple[torch.Tensor, torch.Tensor, float | None]:
    name = getattr(adapter, "name", None)
    if name != "lora":
        kind = name or (adapter[0] if isinstance(adapter, tuple) and adapter else "unknown")
        raise CannotBeRemote(f"a patch of another kind than LoRA ({kind}, of {key})")
    up, down, alpha, middle, dora, reshape = (*adapter.weights, None, None)[:6]
    if middle is not None or dora is not None or reshape is not None:
        raise CannotBeRemote(f"a LoRA with more than two matrices for a weight (DoRA…, {key})")
    return up.flatten(1).contiguous(), down.flatten(1).contiguous(), alpha


def _rows(key: str, offset: Any) -> str:
    """The part of the weight's name for a patch of some of its rows."""
    if offset is None:
        return ""
    axis, start, count = offset
    if axis != 0:
        raise CannotBeRemote(f"a LoRA of some columns of {key}")
    return f"[{start}:{start + count}]"


def _describe(layer: _Layer, label: str) -> m.Component:
    digest = hashlib.sha256()
    for name in sorted(layer.tensors):
        digest.update(name.encode() + b"\0" + digest_tensor(layer.tensors[name]))
    return m.Component(
        fingerprint=f"bytes:{digest.hexdigest()}",
        role="lora",
        label=label,
        tensors=lay_out(describe_tensors(layer.tensors)),
    )


def _fill(tensors: dict[str, torch.Tensor], writer: RegionWriter) -> None:
    writer.copy_tensors(tensors)


def _release(stack: _Stack) -> None:
    for attachment in stack.held:
        attachment.release()
