"""A ModelPatcher whose weights stay where they are: in a region of the daemon."""

from __future__ import annotations

import logging
from typing import Any

import comfy.model_patcher

from .shared_weights import SharedWeights

_log = logging.getLogger("xdit_sidecar.comfyui")


class SharedPatcher(comfy.model_patcher.ModelPatcher):
    """Never moves a weight, and never writes to one that is shared.

    ComfyUI's plain patcher, also where dynamic VRAM is on, with load and offload device the same:
    unloading frees nothing, as others use the weights. What a LoRA patches becomes a copy of this
    ComfyUI's own.
    """

    def __init__(
        self, model: Any, load_device: Any, offload_device: Any = None, *args: Any, **kwargs: Any
    ) -> None:
        super().__init__(model, load_device, load_device, *args, **kwargs)

    @classmethod
    def of_clip(cls, clip: Any) -> SharedPatcher:
        """For a ``comfy.sd.CLIP``, in the place of its own patcher; without that one's patches."""
        patcher = cls(clip.cond_stage_model, clip.patcher.load_device)
        patcher.hook_mode, patcher.is_clip = clip.patcher.hook_mode, True
        return patcher

    @property
    def shared(self) -> SharedWeights:
        """What is shared of the model."""
        found = SharedWeights.of(self.model)
        if found is None:
            raise RuntimeError("the weights of this model are not shared any more: load it again")
        return found

    def load(
        self,
        device_to: Any = None,
        lowvram_model_memory: int = 0,
        force_patch_weights: bool = False,
        full_load: bool = False,
    ) -> Any:
        """Apply patches; nothing is moved, so everything is always loaded."""
        result = super().load(
            self.load_device, 0, force_patch_weights=force_patch_weights, full_load=True
        )
        if astray := self.shared.restore(but=self.patches):
            _log.warning("xDiT: %d shared weights had been moved, and are shared again", astray)
        return result

    def partially_unload(self, device_to: Any, memory_to_free: int = 0, *_: Any, **__: Any) -> int:
        """Nothing can be freed: 0 bytes."""
        return 0

    def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True) -> Any:
        """Take patches back; the weights stay."""
        result = super().unpatch_model(None, unpatch_weights)
        if unpatch_weights:
            self.shared.restore()
        return result

    def pin_weight_to_device(self, key: str) -> None:
        """Shared memory is not this process's to pin."""

    def patch_hook_weight_to_device(
        self, hooks: Any, combined_patches: Any, key: str, *args: Any, **kwargs: Any
    ) -> Any:
        """Hooks write in place: into a private copy."""
        if key in combined_patches:
            self.shared.make_private(key)
        return super().patch_hook_weight_to_device(hooks, combined_patches, key, *args, **kwargs)

    def patch_cached_hook_weights(
        self, cached_weights: Any, key: str, *args: Any, **kwargs: Any
    ) -> Any:
        """As above."""
        self.shared.make_private(key)
        return super().patch_cached_hook_weights(cached_weights, key, *args, **kwargs)

    def unpatch_hooks(self, whitelist_keys_set: Any = None) -> None:
        """Back to the shared weights when no hook is left."""
        super().unpatch_hooks(whitelist_keys_set)
        if not self.hook_backup and self.model is not None and SharedWeights.of(self.model):
            self.shared.restore(but=self.backup)
