"""diffusers' AutoencoderKL around weights that are already in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from ...models.vae_config import IMAGE_CHANNELS, LATENT_SCALE, LATENT_SHIFT, NORM_GROUPS, VaeConfig
from ...models.vae_memory import TILE, TILE_OVERLAP
from ..casting import use_casting_twins
from .layers import TWINS
from .tiles import Decode, decode_in_tiles
from .weights import map_weights

COMPUTE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Vae(NamedTuple):
    """A ``diffusers.AutoencoderKL`` whose parameters are views of given tensors.

    Latents are as ComfyUI's LATENT wires carry them: without the scale and shift of FLUX.1, which
    belong to the transformer. ``shared_bytes`` lie in the given tensors, ``cast_layers`` cast
    their weights to ``compute_dtype`` at use.
    """

    model: nn.Module
    config: VaeConfig
    compute_dtype: torch.dtype
    shared_bytes: int
    cast_layers: int

    @property
    def device(self) -> torch.device:
        """Where the weights lie and pictures come out."""
        return next(self.model.parameters()).device

    @torch.no_grad()
    def decode(self, latent: torch.Tensor, *, tiles: bool = False) -> torch.Tensor:
        """[batch, 16, h, w] in any floating dtype to pictures [batch, height, width, 3].

        fp32 from 0 to 1, on the VAE's device. One picture after the other, so that a batch takes
        the memory of one. ``tiles``: in overlapping tiles, which takes less memory and gives
        slightly other colours. Raises ValueError for another shape.
        """
        return decode_images(self, latent, self.decode_one, tiles=tiles)

    def decode_one(self, latent: torch.Tensor) -> torch.Tensor:
        """[1, 16, h, w] in the compute dtype to fp32 [1, 3, height, width], about -1 to 1."""
        image: torch.Tensor = self.model.get_submodule("decoder")(latent)
        return image.float()

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Pictures [batch, height, width, 3] from 0 to 1, in any floating dtype, to latents.

        fp32 [batch, 16, h, w] on the VAE's device. The most likely latent; nothing is drawn.
        Heights and widths that the ratio does not divide are cut on both sides, as ComfyUI cuts
        them. Raises ValueError for another shape or dtype.
        """
        check_images(self.config, images)
        ratio = self.config.ratio
        for axis in (1, 2):
            size = images.shape[axis]
            images = images.narrow(axis, size % ratio // 2, size - size % ratio)
        encoder = self.model.get_submodule("encoder")
        latents = []
        for image in images.movedim(3, 1):
            pixels = (image[None] * 2 - 1).to(self.device, self.compute_dtype)
            moments: torch.Tensor = encoder(pixels)
            latents.append(moments[:, : self.config.latent_channels].float())
        if not latents:
            sides = [size // ratio for size in images.shape[1:3]]
            return torch.zeros((0, self.config.latent_channels, *sides), device=self.device)
        return torch.cat(latents)


def build_vae(
    config: VaeConfig, tensors: Mapping[str, torch.Tensor], compute_dtype: torch.dtype
) -> Vae:
    """The VAE whose parameters are views of ``tensors``, by names without prefix.

    Any device and any of the file's dtypes; layers that are stored in ``compute_dtype`` (fp32, fp16
    or bf16) are used as they are, the others cast at use. No parameter requires a gradient, and
    the tensors stay alive as long as the model. Raises ValueError for another compute dtype and
    for missing or unknown tensors, RuntimeError for shapes that differ from the config's.
    """
    if compute_dtype not in COMPUTE_DTYPES:
        raise ValueError(f"a VAE cannot compute in {compute_dtype}: use fp32, fp16 or bf16")
    state = map_weights(config, tensors)
    shared_bytes = sum(tensor.nbytes for tensor in state.values())
    model = empty_vae(config)
    cast_layers = use_casting_twins(model, state, compute_dtype, TWINS)
    model.requires_grad_(False)
    model.load_state_dict(state, strict=True, assign=True)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise RuntimeError(
                f"this version of diffusers gives the VAE a tensor that no file has: {name}"
            )
    keep_dtype(model.get_submodule("decoder"), compute_dtype)
    return Vae(model.eval(), config, compute_dtype, shared_bytes, cast_layers)


def empty_vae(config: VaeConfig) -> nn.Module:
    """The same model on torch's meta device: all modules, no bytes."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    levels = len(config.widths)
    arguments: dict[str, Any] = {
        "in_channels": IMAGE_CHANNELS,
        "out_channels": IMAGE_CHANNELS,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": config.widths,
        "layers_per_block": config.blocks,
        "latent_channels": config.latent_channels,
        "norm_num_groups": NORM_GROUPS,
        "scaling_factor": LATENT_SCALE,
        "shift_factor": LATENT_SHIFT,
        # Pipelines would otherwise turn the shared weights into fp32.
        "force_upcast": False,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    construct: Any = AutoencoderKL  # untyped
    with torch.device("meta"):
        model: nn.Module = construct(**arguments)
    return model


def keep_dtype(decoder: nn.Module, compute_dtype: torch.dtype) -> None:
    """Have the decoder go on in the compute dtype after its middle.

    distvae, and diffusers in older versions, cast there to the dtype of the weights.
    """

    def recast(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0].to(compute_dtype), *args[1:])

    decoder.get_submodule("up_blocks.0").register_forward_pre_hook(recast)


def check_images(config: VaeConfig, images: torch.Tensor) -> None:
    """Raise ValueError for what ``Vae.encode`` does not take."""
    fits = images.ndim == 4 and images.shape[3] == IMAGE_CHANNELS
    if not (fits and min(images.shape[1:3]) >= config.ratio and images.is_floating_point()):
        raise ValueError(
            f"images of shape {list(images.shape)} and {images.dtype}: give [batch, height, "
            f"width, 3] from 0 to 1 with sides of at least {config.ratio}"
        )


def check_latent(config: VaeConfig, latent: torch.Tensor) -> None:
    """Raise ValueError for what ``Vae.decode`` does not take."""
    if latent.ndim != 4 or latent.shape[1] != config.latent_channels or 0 in latent.shape[2:]:
        raise ValueError(
            f"a latent of shape {list(latent.shape)}: this VAE takes "
            f"[batch, {config.latent_channels}, height, width]"
        )


def decode_images(vae: Vae, latent: torch.Tensor, decode: Decode, *, tiles: bool) -> torch.Tensor:
    """``decode`` for each latent of a batch, or for each of its tiles, as ``Vae.decode`` says."""
    check_latent(vae.config, latent)
    config = vae.config
    height, width = (size * config.ratio for size in latent.shape[2:])
    images = torch.empty((len(latent), height, width, IMAGE_CHANNELS), device=vae.device)
    for number in range(len(latent)):
        one = latent[number : number + 1].to(vae.device, vae.compute_dtype)
        if tiles:
            image = decode_in_tiles(one, decode, config.ratio, tile=TILE, overlap=TILE_OVERLAP)
        else:
            image = decode(one)
        images[number] = image[0].add(1).div_(2).clamp_(0, 1).movedim(0, 2)
    return images
