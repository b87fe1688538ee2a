"""TEST ONLY, a custom node pack: what some packs do to a model that ComfyUI's own nodes do not."""

from __future__ import annotations

from typing import Any

import comfy.conds
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


def _damp(executor: Any, *args: Any, **kwargs: Any) -> Any:
    result = executor(*args, **kwargs)
    # Of one condition, or of each.
    return [each * 0.9 for each in result] if isinstance(result, list) else result * 0.9


_hooks: list[Any] = []  # that are in place


def _damp_output(module: Any, args: Any, output: Any) -> Any:
    return output * 0.9


def _hold_back(patcher: Any) -> None:
    hook = patcher.model.diffusion_model.register_forward_hook(_damp_output)
    _hooks.append(hook)


def _let_go(patcher: Any) -> None:
    _hooks.pop().remove()


def _add(clone: Any, what: str) -> None:
    """What packs add to a ModelPatcher, besides LoRAs and options; each changes the result."""
    callbacks = comfy.patcher_extension.CallbacksMP
    if what == "injection":
        injection = comfy.patcher_extension.PatcherInjection(_hold_back, _let_go)
        clone.set_injections("test", [injection])
    elif what == "callback":
        clone.add_callback(callbacks.ON_PRE_RUN, _hold_back)
        clone.add_callback(callbacks.ON_CLEANUP, _let_go)
    elif what == "weight wrapper":
        clone.add_weight_wrapper("diffusion_model.img_in.weight", lambda weight: weight * 1.1)
    else:
        clone.add_wrapper_with_key(what, "test", _damp)


class AddToModel:
    """Adds some of these to a model, one after another."""

    CATEGORY = "test"
    FUNCTION = "add"
    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",), "what": ("STRING",)}}

    def add(self, model: Any, what: str) -> tuple[Any]:
        clone = model.clone()
        for each in what.split(", "):
            _add(clone, each)
        return (clone,)


class ReplacePart:
    """Puts something else in the place of a part of the diffusion model."""

    CATEGORY = "test"
    FUNCTION = "replace"
    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",), "name": ("STRING",)}}

    def replace(self, model: Any, name: str) -> tuple[Any]:
        setattr(model.model.diffusion_model, name, lambda *args, **kwargs: args[0] * 0)
        return (model,)


class BypassLayer:
    """Looks for a layer as newer versions' LoraLoaderBypass does, which goes on without it."""

    CATEGORY = "test"
    FUNCTION = "find"
    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",)}}

    def find(self, model: Any) -> tuple[Any]:
        try:
            assert model.model.diffusion_model.double_blocks[0].img_attn.qkv.weight is not None
        except (AttributeError, IndexError, KeyError):
            print("layer not found")
        return (model,)


class SetCondition:
    """Says something in a conditioning that ComfyUI's own nodes do not say, or not yet."""

    CATEGORY = "test"
    FUNCTION = "set"
    RETURN_TYPES = ("CONDITIONING",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"conditioning": ("CONDITIONING",), "what": ("STRING",)}}

    def set(self, conditioning: Any, what: str) -> tuple[Any]:
        values = {
            "method": {"reference_latents_method": "index_timestep_zero"},
            "argument": {"model_conds": {"test_argument": comfy.conds.CONDConstant("given")}},
        }
        return ([[context, {**options, **values[what]}] for context, options in conditioning],)


NODE_CLASS_MAPPINGS = {
    "TestAddToModel": AddToModel,
    "TestBypassLayer": BypassLayer,
    "TestPositiveGuider": PositiveGuider,
    "TestReplacePart": ReplacePart,
    "TestSetCondition": SetCondition,
    "TestWrapDiffusionModel": WrapDiffusionModel,
}
