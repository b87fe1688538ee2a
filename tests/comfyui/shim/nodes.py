"""Output nodes that show tests the numbers in a workflow."""

from __future__ import annotations

import bisect
import os
from collections.abc import Iterator
from typing import Any

import comfy.controlnet
import comfy.model_management
import folder_paths
import torch
from safetensors.torch import save_file


class _Anything(str):
    """The type of an input that takes any output."""

    __slots__ = ()

    def __ne__(self, other: object) -> bool:
        return False

    __eq__ = str.__eq__
    __hash__ = str.__hash__


class SaveTensors:
    """Writes ``output/NAME.safetensors``.

    samples, noise_mask; images; mask; conditioning.N.cond and conditioning.N.KEY, with numbers as
    0-dimensional tensors and lists as KEY.0, KEY.1 and so on.
    """

    CATEGORY = "test"
    FUNCTION = "save"
    OUTPUT_NODE = True
    RETURN_TYPES = ()

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        kinds = {
            "samples": "LATENT",
            "images": "IMAGE",
            "mask": "MASK",
            "conditioning": "CONDITIONING",
        }
        return {
            "required": {"name": ("STRING", {})},
            "optional": {name: (kind,) for name, kind in kinds.items()},
        }

    def save(
        self,
        name: str,
        samples: dict[str, Any] | None = None,
        images: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        conditioning: list[Any] | None = None,
    ) -> dict[str, Any]:
        tensors: dict[str, torch.Tensor] = {}
        if samples is not None:
            tensors |= _flatten("", samples)
        if images is not None:
            tensors["images"] = images
        if mask is not None:
            tensors["mask"] = mask
        for number, (cond, extra) in enumerate(conditioning or []):
            tensors |= _flatten(f"conditioning.{number}.", {"cond": cond, **extra})
        # A copy of each: tensors that share memory cannot be saved.
        plain = {key: tensor.detach().cpu().clone() for key, tensor in tensors.items()}
        path = os.path.join(folder_paths.get_output_directory(), f"{name}.safetensors")
        save_file({key: tensor.contiguous() for key, tensor in plain.items()}, f"{path}.part")
        os.replace(f"{path}.part", path)
        return {"ui": {"tensors": [name]}}


def _flatten(prefix: str, values: dict[str, Any]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for key, value in values.items():
        if isinstance(value, torch.Tensor):
            found[f"{prefix}{key}"] = value
        elif isinstance(value, (bool, int, float)):
            found[f"{prefix}{key}"] = torch.tensor(value)
        elif isinstance(value, (list, tuple)):
            found |= _flatten(prefix, {f"{key}.{i}": each for i, each in enumerate(value)})
    return found


class ReportParameters:
    """Tells where the parameters and buffers of models lie, in the prompt's outputs.

    ``parameters``: one object per tensor; ``mapped`` is the file that is mapped where the tensor
    begins, "" if none is. ``load`` loads the models first, wholly. ``after`` takes
    any output: what has to run before this.
    """

    CATEGORY = "test"
    FUNCTION = "report"
    OUTPUT_NODE = True
    RETURN_TYPES = ()

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"load": ("BOOLEAN", {"default": False})},
            "optional": {
                **{name: (name.upper(),) for name in ("model", "clip", "vae")},
                "after": (_Anything("*"),),
            },
        }

    @classmethod
    def IS_CHANGED(cls, **inputs: Any) -> float:
        return float("nan")  # addresses change without an input changing: never from the cache

    def report(
        self, load: bool, model: Any = None, clip: Any = None, vae: Any = None, after: Any = None
    ) -> dict[str, Any]:
        patchers = {
            "model": model,
            "clip": clip and clip.patcher,
            "vae": vae and vae.patcher,
        }
        given = {kind: patcher for kind, patcher in patchers.items() if patcher is not None}
        if load:
            comfy.model_management.load_models_gpu([*given.values()], force_full_load=True)
        files = _MappedFiles()
        found = [
            each for kind, patcher in given.items() for each in _describe(kind, patcher, files)
        ]
        return {"ui": {"parameters": found}}


class _MappedFiles:
    """What this process has mapped, where."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._maps: list[tuple[int, str]] = []  # (end, file)
        with open("/proc/self/maps", encoding="utf-8") as lines:
            for line in lines:
                start, end = (int(each, 16) for each in line.split()[0].split("-"))
                self._starts.append(start)
                self._maps.append((end, " ".join(line.split()[5:])))

    def at(self, address: int) -> str:
        end, file = self._maps[bisect.bisect(self._starts, address) - 1]
        return file if address < end else ""


def _describe(kind: str, patcher: Any, files: _MappedFiles) -> Iterator[dict[str, Any]]:
    for name, tensor in (*patcher.model.named_parameters(), *patcher.model.named_buffers()):
        yield {
            "of": kind,
            "name": name,
            "parameter": isinstance(tensor, torch.nn.Parameter),
            "mapped": "" if tensor.device.type != "cpu" else files.at(tensor.data_ptr()),
            "data_ptr": tensor.data_ptr() if tensor.device.type != "meta" else None,
            "device": str(tensor.device),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "nbytes": tensor.nbytes,
            "storage_nbytes": tensor.untyped_storage().nbytes(),
            "shared": tensor.is_shared() if tensor.device.type == "cpu" else None,
            "load_device": str(patcher.load_device),
            "offload_device": str(patcher.offload_device),
        }


class Dynamic:
    """Stands for what newer versions have: models whose weights ComfyUI pages itself."""

    CATEGORY = "test"
    FUNCTION = "mark"
    RETURN_TYPES = ("VAE", "CLIP")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"optional": {"vae": ("VAE",), "clip": ("CLIP",)}}

    def mark(self, vae: Any = None, clip: Any = None) -> tuple[Any, Any]:
        for found in (vae, clip):
            if found is not None:
                found.patcher.is_dynamic = lambda: True
        return vae, clip


class _Control(comfy.controlnet.ControlBase):
    def get_control(self, x_noisy: Any, *_: Any) -> dict[str, list[Any]]:
        tokens = x_noisy.shape[-2] // 2 * (x_noisy.shape[-1] // 2)
        added = torch.full((1, tokens, 1), 0.1 * self.strength, dtype=x_noisy.dtype)
        return {"input": [added], "middle": [], "output": []}

    def copy(self) -> Any:
        twin = _Control()
        self.copy_to(twin)
        return twin


class Control:
    """A ControlNet without weights: adds to the first double block of FLUX."""

    CATEGORY = "test"
    FUNCTION = "make"
    RETURN_TYPES = ("CONTROL_NET",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {}}

    def make(self) -> tuple[Any]:
        return (_Control(),)


class NoConditioning:
    """No prompt at all."""

    CATEGORY = "test"
    FUNCTION = "make"
    RETURN_TYPES = ("CONDITIONING",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {}}

    def make(self) -> tuple[list[Any]]:
        return ([],)


NODE_CLASS_MAPPINGS = {
    "TestNoConditioning": NoConditioning,
    "TestControl": Control,
    "TestDynamic": Dynamic,
    "TestSaveTensors": SaveTensors,
    "TestReportParameters": ReportParameters,
}
