"""A ComfyUI MODEL without weights, whose forward is answered by the daemon's ranks."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.utils
import torch

from ..protocol import messages as m
from ..protocol.client.attachment import Attachment
from ..protocol.component_file import ComponentFile, hand_over_file
from ..protocol.errors import UnsupportedModel
from ..protocol.messages.jobs import RefLatentsMethod
from ..protocol.safetensors_file import SafetensorsFile
from .link import Link, stop_if_interrupted
from .lora_patches import LoraComponents
from .ranks_jobs import COMPUTE, run_on_ranks
from .refusals import check_call
from .shared_weights import read_shapes

_ROLE = "transformer"
_LOAD_SECONDS = 600.0  # without a byte of progress
_CHECKPOINT = "model.diffusion_model."  # what the names begin with in whole checkpoints
_NODE = "XDiT UNet Loader"
# What may be set of a RemoteTransformer.
_ATTRIBUTES = {
    "_is_torch_compile",  # by torch, for who has it compiled: told when it is sampled
    *("training", "dtype", "patch_size", "params", "owner", "link", "degrees", "fp8_matmul"),
    *("_node", "_path", "_prefix", "_shapes", "_keep", "_held", "_loras"),
}


class WeightlessModel(RuntimeError):
    """Something in the workflow wants to read the weights of a model that has none here."""

    def __init__(self, what: str, node: str) -> None:
        super().__init__(
            f"the model of the {node!r} node has no weights in ComfyUI, they are in the daemon: "
            f"{what} cannot work with it. Use ComfyUI's own loader for that"
        )


class RemoteTransformer(torch.nn.Module):
    """Stands where ``BaseModel.diffusion_model`` stands; has no parameters."""

    def __init__(
        self,
        link: Link,
        path: Path,
        prefix: str,
        shapes: Mapping[str, torch.Tensor],
        dtype: torch.dtype,
        patch_size: int,
        degrees: m.Degrees | None,
        *,
        fp8_matmul: bool = False,
        keep: bool = True,
        node: str = _NODE,
    ) -> None:
        """``shapes``: the weights as tensors on the meta device, by BFL's names.

        ``keep``: leave it in the daemon at the end. ``node``: the loader's name, for errors.
        """
        super().__init__()
        self._node = node
        self.dtype = dtype
        self.patch_size = patch_size
        self.params = SimpleNamespace(patch_size=patch_size)  # some nodes see by it what FLUX it is
        self.owner: weakref.ref[Any] | None = None  # the BaseModel, which knows its patcher
        self.link = link
        self._path = path
        self._prefix = prefix
        self._shapes = dict(shapes)
        self.degrees = degrees
        self.fp8_matmul = fp8_matmul
        self._keep = keep
        self._held: dict[str, Attachment] = {}  # by device
        self._loras = LoraComponents(link)

    # --- what others ask of weights

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", **_: Any) -> Any:
        """Names and shapes, for LoRA loaders. Raises WeightlessModel for who wants to save it."""
        if not prefix:
            raise WeightlessModel("saving or merging a model", self._node)
        result = {} if destination is None else destination
        result.update({prefix + name: tensor for name, tensor in self._shapes.items()})
        return result

    def __getattr__(self, name: str) -> Any:
        if name in {key.partition(".")[0] for key in self.__dict__.get("_shapes", ())}:
            # No AttributeError: some who look for layers to patch would go on without them.
            raise WeightlessModel(f"whatever reads its {name}", self._node)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        # Packs replace parts of FLUX here, which the ranks would not know of.
        if name not in _ATTRIBUTES:
            raise WeightlessModel(f"whatever sets its {name}", self._node)
        super().__setattr__(name, value)

    # --- residence

    def hand_over(self) -> None:
        """Have the file resident wherever the ranks work. Raises SidecarError."""
        held = {}
        with SafetensorsFile.open(self._path) as file:
            component = ComponentFile(file, role=_ROLE, prefix=self._prefix)
            progress = _Progress(component.component)
            for device in self.link.rank_devices():
                held[device] = hand_over_file(
                    self.link.client,
                    component,
                    device,
                    timeout=_LOAD_SECONDS,
                    should_cancel=stop_if_interrupted,
                    on_progress=progress.tell,
                )
        self.release()
        self._held = held

    def release(self) -> None:
        """Let go of the component; the daemon keeps it until it needs the room."""
        held, self._held = self._held, {}
        for attachment in held.values():
            attachment.release()

    def drop(self) -> None:
        """ComfyUI does not use the model any more."""
        resident = [(held.component.fingerprint, device) for device, held in self._held.items()]
        self.release()
        for fingerprint, device in () if self._keep else resident:
            self.link.client.evict_soon(fingerprint, device)

    # --- the call

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """FLUX's prediction for (B, C, H, W); called as ComfyUI's own module, see `_forward`."""
        call = _CALL.bind(self, *args, **kwargs)
        call.apply_defaults()
        options = call.arguments["transformer_options"] or {}
        call.arguments["transformer_options"] = options
        wrappers = comfy.patcher_extension.get_all_wrappers(
            comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, options
        )
        run = comfy.patcher_extension.WrapperExecutor.new_class_executor(
            self._forward, self, wrappers
        )
        # Wrappers of other nodes expect the arguments by their places.
        output: torch.Tensor = run.execute(*call.args[1:], **call.kwargs)
        return output

    def _forward(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor,
        context: torch.Tensor,
        y: torch.Tensor | None = None,
        guidance: torch.Tensor | None = None,
        ref_latents: list[torch.Tensor] | None = None,
        control: Any = None,
        transformer_options: Mapping[str, Any] | None = None,
        **others: Any,
    ) -> torch.Tensor:
        check_call(control, transformer_options or {}, others)
        tensors = {"x": x, "timestep": timestep, "context": context}
        if y is not None:
            tensors["y"] = y
        if guidance is not None:
            tensors["guidance"] = guidance
        for number, reference in enumerate(ref_latents or []):
            tensors[f"ref_latents.{number}"] = reference
        method: RefLatentsMethod = others.get("ref_latents_method") or "offset"
        compute = COMPUTE[x.dtype]
        owner = self.owner() if self.owner is not None else None
        patcher = getattr(owner, "current_patcher", None)

        def make_job() -> m.Forward:
            return m.Forward(
                components=self.components(),
                tensors=[],
                compute=compute,
                fp8_matmul=self.fp8_matmul,
                degrees=self.degrees,
                adapters=self.adapters(patcher),
                ref_latents_method=method,
            )

        outputs = run_on_ranks(self.link, make_job, tensors, self.renew)
        return outputs["output"].to(x.device)

    # --- what a job is made of

    def components(self) -> dict[str, str]:
        """The transformer's, for a job; handed over now if it is not any more."""
        if not self._held:
            self.hand_over()
        held = next(iter(self._held.values()))
        return {_ROLE: held.component.fingerprint}

    def adapters(self, patcher: Any) -> list[m.Adapter]:
        """The LoRAs of a ModelPatcher of this model. Raises CannotBeRemote for other patches."""
        return [] if patcher is None else self._loras.of(patcher, list(self._held))

    def renew(self) -> None:
        """Have the weights resident again, and the LoRAs with the next job. Raises SidecarError."""
        self.hand_over()
        self._loras.forget()


_CALL = inspect.signature(RemoteTransformer._forward)


class _Progress:
    """A progress bar on the node."""

    def __init__(self, component: m.Component) -> None:
        total = sum(spec.nbytes for spec in component.tensors)
        self._bar = comfy.utils.ProgressBar(max(1, total))

    def tell(self, done: int, total: int) -> None:
        """Called with bytes done and in all."""
        self._bar.update_absolute(done, total)


def load_remote_model(
    link: Link,
    path: Path,
    dtype: torch.dtype | None,
    degrees: m.Degrees | None,
    *,
    fp8_matmul: bool = False,
    keep: bool = True,
    node: str = _NODE,
) -> Any:
    """A ``ModelPatcher`` around a weightless FLUX.1, whose file is handed over and not loaded.

    ``dtype`` is what ComfyUI calls the weights' dtype; None: its own choice for the file.
    ``fp8_matmul``: see :class:`..protocol.messages.Forward`. ``keep``: the daemon keeps it when
    ComfyUI drops the model. ``node``: the loader's name, for errors.
    Raises SidecarError.
    """
    shapes = read_shapes(path, _CHECKPOINT)
    prefix = _CHECKPOINT if shapes else ""
    shapes = shapes or read_shapes(path)
    config = comfy.model_detection.model_config_from_unet(dict(shapes), "")
    if config is None or config.unet_config.get("image_model") != "flux":
        raise UnsupportedModel(
            f"{path.name!r} is no FLUX.1 transformer that ComfyUI knows: the ranks serve FLUX.1 "
            "dev, schnell, Kontext, Fill, Canny and Depth"
        )
    load_device = comfy.model_management.get_torch_device()
    weights_dtype = None if _is_quantised(shapes) else comfy.utils.weight_dtype(shapes)
    supported = list(config.supported_inference_dtypes)
    chosen = dtype or comfy.model_management.unet_dtype(
        model_params=sum(tensor.numel() for tensor in shapes.values()),
        supported_dtypes=supported,
        weight_dtype=weights_dtype,
    )
    # What the user chose is what the ranks compute in, whatever ComfyUI's own device can.
    cast = None
    if dtype is None:
        cast = comfy.model_management.unet_manual_cast(chosen, load_device, supported)
    config.set_inference_dtype(chosen, cast)
    config.unet_config["disable_unet_model_creation"] = True
    base = config.get_model({}, "")
    patch_size = config.unet_config.get("patch_size", 2)
    transformer = RemoteTransformer(
        link,
        path,
        prefix,
        shapes,
        chosen,
        patch_size,
        degrees,
        fp8_matmul=fp8_matmul,
        keep=keep,
        node=node,
    )
    transformer.owner = weakref.ref(base)
    transformer.hand_over()
    base.diffusion_model = transformer
    base.memory_required = _needs_nothing
    # The lease ends when ComfyUI drops the model.
    weakref.finalize(base, transformer.drop)
    return comfy.model_patcher.ModelPatcher(
        base, load_device, comfy.model_management.unet_offload_device(), size=1
    )


def _is_quantised(names: Iterable[str]) -> bool:
    """As a file's tensors tell; where ComfyUI notes it differs from version to version."""
    return any(name == "scaled_fp8" or name.endswith(".comfy_quant") for name in names)


def _needs_nothing(*_: Any, **__: Any) -> int:
    """Cond and uncond always go in one batch: the ranks look after their memory themselves."""
    return 0
