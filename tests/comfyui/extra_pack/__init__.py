"""TEST ONLY, a custom node pack: what some packs do to a model that ComfyUI's own nodes do not."""

from __future__ import annotations

from typing import Any

import comfy.patcher_extension
import comfy.samplers

_OUTER = comfy.patcher_extension.WrappersMP.OUTER_SAMPLE


class PositiveOnly(comfy.samplers.CFGGuider):
    """What wrappers find in it says with None that there is no negative condition."""

    def outer_sample(self, *args: Any, **kwargs: Any) -> Any:
        self.conds = {kind: group for kind, group in self.conds.items() if group is not None}
        return super().outer_sample(*args, **kwargs)


def _leave_negative_out(executor: Any, *args: Any, **kwargs: Any) -> Any:
    executor.class_obj.conds["negative"] = None
    return executor(*args, **kwargs)


class PositiveGuider:
    """Makes one for SamplerCustomAdvanced."""

    CATEGORY = "test"
    FUNCTION = "make"
    RETURN_TYPES = ("GUIDER",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",), "conditioning": ("CONDITIONING",)}}

    def make(self, model: Any, conditioning: Any) -> tuple[Any]:
        clone = model.clone()
        # Before all others.
        clone.wrappers[_OUTER] = {"test": [_leave_negative_out], **clone.wrappers.get(_OUTER, {})}
        guider = PositiveOnly(clone)
        guider.inner_set_conds({"positive": conditioning})
        return (guider,)


def _turn_down(executor: Any, x: Any, timestep: Any, context: Any, *rest: Any, **more: Any) -> Any:
    """Calls as packs do, by the arguments' places: y, guidance, references, control, options."""
    y, guidance, references, control, options = rest
    assert options["wrappers"]
    return 0.9 * executor(
        x, timestep, context, y, guidance * 0.5, references, control, options, **more
    )


class WrapDiffusionModel:
    """Puts a wrapper around every call of the diffusion model."""

    CATEGORY = "test"
    FUNCTION = "wrap"
    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",)}}

    def wrap(self, model: Any) -> tuple[Any]:
        clone = model.clone()
        kind = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
        clone.add_wrapper_with_key(kind, "test", _turn_down)
        return (clone,)


NODE_CLASS_MAPPINGS = {
    "TestPositiveGuider": PositiveGuider,
    "TestWrapDiffusionModel": WrapDiffusionModel,
}
