"""A ModelPatcher whose weights stay where they are: in a region of the daemon."""

from __future__ import annotations

import gc
import logging
from typing import Any

import comfy.model_patcher

from .shared_weights import SharedWeights

_log = logging.getLogger("xdit_sidecar.comfyui")

_LOADED = 1  # bytes; 0 would mean to ComfyUI that it has to be loaded


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

    @classmethod
    def take_over(cls, module: Any) -> None:
        """Make all patchers of a shared module such ones, also those that other nodes hold.

        A plain one among them would move the weights, and its hooks would write to the region.
        """
        for patcher in patchers_of(module):
            patcher.__class__ = cls
            patcher.offload_device = patcher.load_device
            patcher.weight_inplace_update = False
            module.device = patcher.load_device
        module.model_loaded_weight_memory = 0  # so that it is loaded in our way next time

    @property
    def shared(self) -> SharedWeights:
        """What is shared of the model."""
        found = SharedWeights.of(self.model)
        if found is None:
            raise RuntimeError("the weights of this model are not shared any more: load it again")
        return found

    def model_size(self) -> int:
        """Bytes that are this ComfyUI's own: of the shared weights those that are patched."""
        return _LOADED + self.shared.nbytes_of(self.patches.keys() | self.hook_backup.keys())

    def partially_load(
        self, device_to: Any, extra_memory: float = 0, *args: Any, **kwargs: Any
    ) -> Any:
        """All of it, however little memory there is."""
        result = super().partially_load(self.load_device, max(0, extra_memory), *args, **kwargs)
        self._share_again()
        return result

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
        self._share_again()
        return result

    def _share_again(self) -> None:
        if astray := self.shared.restore(but=self.patches.keys() | self.hook_backup.keys()):
            _log.warning("xDiT: %d shared weights had been moved, and are shared again", astray)

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
        """Back to the shared weights where no hook is left."""
        for key in self.hook_backup:
            self.shared.make_private(key)  # what was there before is written in place, too
        super().unpatch_hooks(whitelist_keys_set)
        self.shared.restore(but=self.backup.keys() | self.hook_backup.keys())


def patchers_of(module: Any) -> list[Any]:
    """Every ModelPatcher of a module, of whatever kind, wherever it is held."""
    return [
        found
        for found in gc.get_objects()
        # Not isinstance: it asks objects for their __class__, and lazy ones then wake up.
        if issubclass(type(found), comfy.model_patcher.ModelPatcher) and found.model is module
    ]
