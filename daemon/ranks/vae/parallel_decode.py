"""One latent decoded by several ranks, each a band of rows, with distvae around shared weights.

distvae rebuilds a decoder in place and cannot undo it, so it gets one of its own; both read the
same bytes. Convolutions fetch rows from the neighbours, norms add up sums over all ranks.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..casting import cast, use_casting_twins
from .layers import TWINS
from .model import Vae, decode_images, empty_vae, keep_dtype


class ParallelDecoder:
    """A VAE's decoder over the ranks of a process group; every rank has the same VAE."""

    def __init__(self, vae: Vae, group: dist.ProcessGroup | None = None) -> None:
        """``group`` None means all ranks. Nothing is exchanged, and no weight is copied."""
        self.vae = vae
        self._ranks = dist.get_world_size(group)
        self._decoder = _make_decoder(vae, group) if self._ranks > 1 else None

    @torch.no_grad()
    def decode(self, latent: torch.Tensor, *, tiles: bool = False) -> torch.Tensor:
        """As :meth:`Vae.decode`; all ranks must call it with the same latent, and all get it all.

        Whatever has fewer latent rows than there are ranks, each rank decodes alone. With
        ``tiles`` the ranks share each tile.
        """
        return decode_images(self.vae, latent, self._decode_one, tiles=tiles)

    def _decode_one(self, latent: torch.Tensor) -> torch.Tensor:
        if self._decoder is None or latent.shape[2] < self._ranks:
            return self.vae.decode_one(latent)
        image: torch.Tensor = self._decoder(latent)
        return image.float()


def _make_decoder(vae: Vae, group: dist.ProcessGroup | None) -> nn.Module:
    distvae: Any = importlib.import_module("distvae.vae")  # untyped
    convolutions: Any = importlib.import_module("distvae.models.layers.conv2d")
    norms: Any = importlib.import_module("distvae.models.layers.normalization")
    twin = empty_vae(vae.config)
    weights = vae.model.state_dict()
    use_casting_twins(twin, weights, vae.compute_dtype, TWINS)
    # Rebuilt on meta: distvae makes new layers, and their weights would be allocated, filled with
    # random numbers and thrown away. Its layers take over the parameters, which tells their names.
    names = {id(parameter): name for name, parameter in twin.named_parameters()}
    distvae.parallelize_decoder(twin, group)
    decoder = twin.get_submodule("decoder")
    for module in decoder.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                shared = weights[names[id(parameter)]]
                module._parameters[leaf] = nn.Parameter(shared, requires_grad=False)
        if (
            isinstance(module, convolutions.PatchConv2d)
            and module.weight.dtype != vae.compute_dtype
        ):
            _cast_at_use(module)
        if isinstance(module, norms.PatchGroupNorm):
            # It multiplies in the wider of the two dtypes.
            module.register_forward_hook(lambda module, args, output: output.to(args[0].dtype))
    keep_dtype(decoder.get_submodule("decoder"), vae.compute_dtype)
    return decoder.eval()


def _cast_at_use(conv: nn.Module) -> None:
    original: Any = conv._conv_forward

    def forward(
        input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        output: torch.Tensor = original(input, weight.to(input.dtype), cast(bias, input.dtype))
        return output

    conv._conv_forward = forward  # type: ignore[assignment]  # a module's attribute
