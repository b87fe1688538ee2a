"""ComfyUI's own modules around weights that lie in a region of the daemon."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path

import comfy.utils
import torch

from ..protocol.client.attachment import Attachment
from ..protocol.component_file import ComponentFile, hand_over_file
from ..protocol.errors import RegionUnavailable, UnsupportedModel
from ..protocol.regions.cuda_driver import CudaDriver
from ..protocol.regions.views import safetensors_dtype, torch_dtype
from ..protocol.safetensors_file import FileTensor, SafetensorsFile
from .link import Link, stop_if_interrupted

_log = logging.getLogger("xdit_sidecar.comfyui")

_LOAD_SECONDS = 600.0  # without a byte of progress
_ATTRIBUTE = "xdit_shared_weights"
#: Role of a text encoder → where ComfyUI's module of a CLIP has its parameters.
ENCODERS = {"clip_l": "clip_l.transformer.", "t5": "t5xxl.transformer."}
# CLIP's projection is not in all files; FLUX.1 does not use it.
_MAY_BE_MISSING = "text_projection.weight"
_DIFFUSERS = ".up_blocks."  # in names of diffusers' VAEs, which ComfyUI renames


class SharedWeights:
    """The parameters of a module that are views of regions; keeps their leases."""

    def __init__(self, module: torch.nn.Module) -> None:
        """``module``: what ComfyUI calls the model, a VAE's or text encoders' whole."""
        self._module = module
        self._views: dict[str, torch.Tensor] = {}
        self._held: list[tuple[Attachment, str]] = []  # and what its names begin with here
        # Lives and ends with the module, whoever else knows the module.
        object.__setattr__(module, _ATTRIBUTE, self)

    @staticmethod
    def of(module: torch.nn.Module) -> SharedWeights | None:
        """What is shared of a module; None if nothing is."""
        found = getattr(module, _ATTRIBUTE, None)
        return found if isinstance(found, SharedWeights) else None

    @property
    def attachments(self) -> list[Attachment]:
        """The components that the module's parameters lie in."""
        return [attachment for attachment, _ in self._held]

    def adopt(self, attachment: Attachment, prefix: str = "") -> None:
        """Point the module's parameters at the component's tensors: ``prefix`` + name each."""
        parameters = dict(self._module.named_parameters())
        for name, view in attachment.tensors().items():
            key = prefix + name
            if key in parameters:
                if not _fit(view.shape, shape := parameters[key].shape):
                    raise UnsupportedModel(
                        f"{attachment.component.label}: {name} is {list(view.shape)}, and "
                        f"ComfyUI's module has {list(shape)}: it is another model"
                    )
                view = self._views[key] = view.reshape(shape)
                comfy.utils.set_attr_param(self._module, key, view)
        self._held.append((attachment, prefix))

    def renew(self, renew: Callable[[Attachment], Attachment]) -> None:
        """Move to the attachments that ``renew`` gives for those held until now."""
        renewed = [(renew(attachment), prefix) for attachment, prefix in self._held]
        held, self._held = self._held, []
        for attachment, prefix in renewed:
            self.adopt(attachment, prefix)
        for attachment, _ in held:
            attachment.release()

    def restore(self, but: Collection[str] = ()) -> int:
        """Point every parameter at its view again, ``but`` those patched; how many were astray."""
        astray = 0
        parameters = dict(self._module.named_parameters())
        for key, view in self._views.items():
            if key in but:
                continue
            if parameters[key].data_ptr() != view.data_ptr():
                comfy.utils.set_attr_param(self._module, key, view)
                astray += 1
        return astray

    def make_private(self, key: str) -> None:
        """Replace a parameter by a copy of its own: somebody is about to write to it."""
        view = self._views.get(key)
        parameter = comfy.utils.get_attr(self._module, key)
        if view is not None and parameter.data_ptr() == view.data_ptr():
            comfy.utils.set_attr_param(self._module, key, view.clone())

    def nbytes_of(self, keys: Iterable[str]) -> int:
        """Of the shared parameters among ``keys``."""
        return sum(self._views[key].nbytes for key in keys if key in self._views)


def device_name(device: torch.device) -> str:
    """The daemon's name of a torch device of this process."""
    if device.type == "cpu":
        return "cpu"
    if device.type != "cuda":
        raise RegionUnavailable(f"memory of a {device.type} device cannot be shared: CUDA and CPU")
    return CudaDriver.load().device_uuid(device.index or 0)


def read_shapes(path: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    """The tensors of a file on the meta device, by their names without prefix. Raises BadFile.

    Those without elements, such as the mark of scaled fp8, are on the CPU: ComfyUI copies them.
    """
    with SafetensorsFile.open(path) as file:
        return {
            spec.name.removeprefix(prefix): torch.empty(
                spec.shape,
                dtype=torch_dtype(spec.dtype),
                device="meta" if spec.nbytes else "cpu",
            )
            for spec, _ in file.tensors
            if spec.name.startswith(prefix)
        }


def first_prefix(path: Path, prefixes: Sequence[str], what: str) -> str:
    """The first of ``prefixes`` that names in the file begin with. Raises UnsupportedModel."""
    with SafetensorsFile.open(path) as file:
        for prefix in prefixes:
            if any(spec.name.startswith(prefix) for spec, _ in file.tensors):
                return prefix
    raise UnsupportedModel(
        f"{path.name!r} has no {what} (no tensor's name begins with {' or '.join(prefixes)}): load "
        "that part from a file of its own"
    )


def share_file(
    link: Link,
    shared: SharedWeights,
    path: Path,
    *,
    role: str,
    device: torch.device,
    file_prefix: str = "",
    module_prefix: str = "",
) -> None:
    """Hand over one component of a file and put its tensors into the module.

    The module was built on the meta device. Its dtypes are kept: tensors of another one in the file
    are converted once, on their way. Raises SidecarError, UnsupportedModel.
    """
    module = shared._module
    with SafetensorsFile.open(path) as file:
        tensors = {
            module_prefix + tensor.spec.name.removeprefix(file_prefix): tensor
            for tensor in file.tensors
            if tensor.spec.name.startswith(file_prefix)
        }
        # Before the daemon has anything of it.
        _check_complete(file, tensors, module, module_prefix)
        dtype = _conversions(tensors, _wanted_dtypes(module))
        component = ComponentFile(file, role=role, prefix=file_prefix, dtype=dtype)
        bar = comfy.utils.ProgressBar(100)
        attachment = hand_over_file(
            link.client,
            component,
            device_name(device),
            timeout=_LOAD_SECONDS,
            should_cancel=stop_if_interrupted,
            on_progress=lambda done, total: bar.update_absolute(int(100 * done / total), 100),
        )
    how = f"read {component.bytes_read} bytes" if component.bytes_read else "was resident"
    _log.info("xDiT: %s %s on %s, %s", role, path.name, device, how)
    shared.adopt(attachment, module_prefix)


def fill_the_rest(module: torch.nn.Module, device: torch.device) -> None:
    """Give real memory to the parameters that no file has. Raises UnsupportedModel."""
    for name, parameter in list(module.named_parameters()):
        if not parameter.is_meta:
            continue
        if not name.endswith(_MAY_BE_MISSING):
            raise UnsupportedModel(f"no file has {name}: use ComfyUI's own loader")
        identity = torch.eye(parameter.shape[0], dtype=parameter.dtype, device=device)
        comfy.utils.set_attr_param(module, name, identity)
    for name, buffer in module.named_buffers():
        if buffer.is_meta:
            raise UnsupportedModel(f"this ComfyUI computes {name} when it loads: not supported yet")


def _check_complete(
    file: SafetensorsFile, tensors: Mapping[str, FileTensor], module: torch.nn.Module, prefix: str
) -> None:
    """Every parameter below ``prefix`` is in the file, in its shape. Raises UnsupportedModel."""
    if any(_DIFFUSERS in name for name in tensors):
        raise UnsupportedModel(
            f"{file.label!r} has diffusers' layout, and only a file in BFL's (ae.safetensors) can "
            "be shared as it is: use that one, or load this one with ComfyUI's own Load VAE and "
            "put XDiT Share behind it"
        )
    for name, parameter in module.named_parameters():
        if not (name.startswith(prefix) and parameter.is_meta) or name.endswith(_MAY_BE_MISSING):
            continue
        if (found := tensors.get(name)) is None:
            raise UnsupportedModel(
                f"{file.label!r} lacks {name}: it is incomplete (download it again), or of a "
                "layout that only ComfyUI's own loader knows"
            )
        if not _fit(found.spec.shape, parameter.shape):
            raise UnsupportedModel(
                f"{file.label!r}: {name} is {found.spec.shape}, and ComfyUI's module has "
                f"{list(parameter.shape)}: it is another model, or damaged"
            )


def _fit(stored: Sequence[int], wanted: Sequence[int]) -> bool:
    """The same shape; a number may also be stored as a list of one."""
    return list(stored) == list(wanted) or (list(stored), list(wanted)) == ([1], [])


def _wanted_dtypes(module: torch.nn.Module) -> dict[str, torch.dtype]:
    """What ComfyUI computes each parameter in.

    Where dynamic VRAM is on, parameters have their file's dtype, as its own patcher converts them
    when it loads them. Ours never does, so that the regions must have what modules note for it.
    """
    found = {}
    for path, part in module.named_modules():
        for name, value in part.named_parameters(recurse=False):
            noted = getattr(part, f"{name}_comfy_model_dtype", None)
            found[f"{path}.{name}".removeprefix(".")] = noted or value.dtype
    return found


def _conversions(
    tensors: Mapping[str, FileTensor], wanted: Mapping[str, torch.dtype]
) -> dict[str, str]:
    """What tensors of the file have to be converted to, by their names there."""
    return {
        tensor.spec.name: target
        for key, tensor in tensors.items()
        if key in wanted and (target := safetensors_dtype(wanted[key])) != tensor.spec.dtype
    }
