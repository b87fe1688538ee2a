"""A small autoencoder of FLUX's kind, trained on the digits' pictures."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from xdit_sidecar.daemon.models.vae_config import LATENT_CHANNELS, VaeConfig
from xdit_sidecar.daemon.models.vae_layers import vae_layers
from xdit_sidecar.daemon.ranks.sampling.latent_format import SCALE
from xdit_sidecar.daemon.ranks.vae.model import Vae, build_vae

from .progress import Progress

SIZES = VaeConfig((32, 32, 64, 64), 1, LATENT_CHANNELS, ("F32",), prefix="", nbytes=0)
_RATE = 2e-3
# Of the divergence from normal noise, for each latent element.
_KL = 1e-4

Tensors = dict[str, Tensor]


def train_autoencoder(pictures: Tensor, *, steps: int, batch: int, seed: int) -> Tensors:
    """Tensors in the layout of latent diffusion, fp32, from pictures (N, H, W, 3), 0 to 1.

    On the pictures' device.
    """
    device = pictures.device
    tensors = {name: tensor.to(device) for name, tensor in _start(seed).items()}
    # The file's own tensors: the model's parameters are views of them.
    model = build_vae(SIZES, tensors, torch.float32).model.train().requires_grad_(True)
    images = (pictures * 2 - 1).movedim(3, 1)
    generator = torch.Generator().manual_seed(seed + 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, steps, pct_start=0.1)
    encoder, decoder = model.get_submodule("encoder"), model.get_submodule("decoder")
    with Progress("autoencoder", steps) as progress:
        for step in range(steps):
            rows = torch.randint(0, len(images), (batch,), generator=generator)
            wanted = images[rows]
            mean, spread = encoder(wanted).chunk(2, 1)
            spread = spread.clamp(-20, 10)
            latent = mean + (spread / 2).exp() * torch.randn(mean.shape, generator=generator).to(
                device
            )
            error = functional.mse_loss(decoder(latent), wanted)
            divergence = (mean.square() + spread.exp() - 1 - spread).mean() / 2
            optimizer.zero_grad()
            (error + _KL * divergence).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            progress.tell(step, error=error.item(), divergence=divergence.item())
    _normalise(tensors, pictures[:256])
    return {name: tensor.detach() for name, tensor in tensors.items()}


def open_autoencoder(tensors: Tensors) -> Vae:
    """The trained model around these tensors."""
    return build_vae(SIZES, tensors, torch.float32)


def _start(seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in vae_layers(SIZES):
        for name, shape in layer.shapes.items():
            if name.endswith(".bias"):
                tensors[name] = torch.zeros(shape)
            elif layer.columns is None:
                tensors[name] = torch.ones(shape)
            else:
                tensor = torch.randn(shape, generator=generator)
                tensors[name] = tensor / tensor[0].numel() ** 0.5
    return tensors


@torch.no_grad()
def _normalise(tensors: Tensors, pictures: Tensor) -> None:
    """Have latents the deviation that FLUX.1 expects of them.

    The encoder's last layer and the decoder's first take the change, which cancels.
    """
    scale = 1 / (SCALE * open_autoencoder(tensors).encode(pictures).std())
    last, first = "encoder.conv_out", "decoder.conv_in"
    tensors[f"{last}.weight"][:LATENT_CHANNELS] *= scale
    tensors[f"{last}.bias"][:LATENT_CHANNELS] *= scale
    tensors[f"{last}.bias"][LATENT_CHANNELS:] += 2 * scale.log()
    tensors[f"{first}.weight"] /= scale
