"""LoRA patches of a ComfyUI model as components: the ranks compute them beside the weights."""

from __future__ import annotations

import hashlib
import weakref
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
from .lora_layers import Layer, read_patches


class _Stack(NamedTuple):
    adapters: list[m.Adapter]
    held: list[Attachment]
    users: weakref.WeakSet[Any]  # the ModelPatchers that have it


class LoraComponents:
    """Hands over what LoraLoader nodes have put into ``patcher.patches``; once per stack.

    A stack is leased as long as ComfyUI keeps a model that has it, for the next prompt.
    """

    def __init__(self, link: Link) -> None:
        self._link = link
        self._stacks: dict[Any, _Stack] = {}  # by patches_uuid

    def of(self, patcher: Any, devices: list[str]) -> list[m.Adapter]:
        """The adapters of a forward of this patcher.

        Raises CannotBeRemote for patches that are no low-rank pairs, SidecarError.
        """
        if not patcher.patches:
            return []
        key = patcher.patches_uuid
        if key not in self._stacks:
            self._stacks[key] = self._hand_over(patcher.patches, devices)
        stack = self._stacks[key]
        if patcher not in stack.users:
            stack.users.add(patcher)
            weakref.finalize(patcher, self._drop, key).atexit = False
        return stack.adapters

    def _drop(self, key: Any) -> None:
        """ComfyUI has dropped a model with this stack."""
        stack = self._stacks.get(key)
        # Not its length, which may still count who is gone.
        if stack is not None and not list(stack.users):
            _release(self._stacks.pop(key))

    def forget(self) -> None:
        """The daemon is another one, or has dropped them."""
        for stack in self._stacks.values():
            _release(stack)
        self._stacks.clear()

    def _hand_over(self, patches: Mapping[str, Any], devices: list[str]) -> _Stack:
        stack = _Stack([], [], weakref.WeakSet())
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


def _describe(layer: Layer, label: str) -> m.Component:
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
