"""A small FLUX.1 transformer, trained by flow matching on the digits' latents."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional
from xdit_sidecar.daemon.models.flux_config import FluxConfig
from xdit_sidecar.daemon.models.flux_layers import flux_layers
from xdit_sidecar.daemon.ranks.flux.latents import from_tokens, to_inputs
from xdit_sidecar.daemon.ranks.flux.model import build_flux
from xdit_sidecar.daemon.ranks.sampling.latent_format import to_vae
from xdit_sidecar.daemon.ranks.sampling.noise import seeded_noise
from xdit_sidecar.daemon.ranks.sampling.schedule import flux_sigmas

from .encoders import WIDTH, Text
from .progress import Progress

# Four heads, so that one, two or four ranks share them, and six blocks for pipelines.
SIZES = FluxConfig(
    in_channels=64,
    out_channels=64,
    hidden_size=128,
    head_size=32,
    mlp_size=512,
    double_blocks=2,
    single_blocks=4,
    context_width=WIDTH,
    pooled_width=WIDTH,
    guidance=True,
    dtypes=("BF16",),
    scaled=False,
    prefix="",
    nbytes=0,
)
_RATE = 2e-3
_AVERAGED = 0.99
# Whatever guidance is asked for, the picture is the same: there was none to be distilled.
_GUIDANCE = (1.0, 6.0)
# So often there is no prompt, which is what cfg compares with.
_UNASKED = 0.1
_SWAPPED = "final_layer.adaLN_modulation.1"

Tensors = dict[str, Tensor]


class Flow(nn.Module):
    """A FLUX.1 model that is told how often each text token comes instead of seeing it so often.

    Text has no positions: equal tokens stay equal, and a key that comes n times counts n times.
    """

    def __init__(self, tensors: Tensors) -> None:
        """``tensors`` in Black Forest Labs' layout, fp32; parameters are views of them."""
        super().__init__()
        self.model = build_flux(SIZES, tensors, torch.float32).model

    def forward(self, x: Tensor, sigma: Tensor, text: Text, guidance: Tensor) -> Tensor:
        """What noise minus picture is in the latents x (N, 16, h, w), at sigma (N,)."""
        inputs, placement = to_inputs(
            SIZES, x, sigma, text.context, text.pooled, guidance, compute_dtype=torch.float32
        )
        counts = functional.pad(text.repeats, (0, placement.tokens), value=1.0)
        (tokens,) = self.model(
            hidden_states=inputs.hidden_states,
            encoder_hidden_states=inputs.encoder_hidden_states,
            pooled_projections=inputs.pooled_projections,
            timestep=inputs.timestep,
            guidance=inputs.guidance,
            img_ids=inputs.img_ids.to(x.device),
            txt_ids=inputs.txt_ids.to(x.device),
            joint_attention_kwargs={"attention_mask": counts.log()[:, None, None]},
            return_dict=False,
        )
        return from_tokens(tokens, placement)


def train_transformer(
    latents: Tensor, texts: Text, digits: Tensor, *, steps: int, batch: int, seed: int
) -> Tensors:
    """Tensors in Black Forest Labs' layout, bf16.

    ``latents`` (N, 16, h, w) are the model's, ``digits`` (N,) what they show; ``texts`` of digit d
    are the rows d, d + 10, d + 20 and so on, and the last row is of no prompt.
    Latents and texts are on the device that trains.
    """
    device = latents.device
    tensors = {name: tensor.to(device) for name, tensor in _start(seed).items()}
    flow = Flow(tensors).train().requires_grad_(True)
    generator = torch.Generator().manual_seed(seed + 1)
    parameters = list(flow.parameters())
    averages = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=_RATE, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, steps, pct_start=0.1)
    nothing = len(texts.pooled) - 1
    forms = nothing // 10
    with Progress("transformer", steps) as progress:
        for step in range(steps):
            rows = torch.randint(0, len(latents), (batch,), generator=generator)
            asked = digits[rows] + 10 * torch.randint(0, forms, (batch,), generator=generator)
            asked[torch.rand(batch, generator=generator) < _UNASKED] = nothing
            # More noise than less: where a picture begins is decided what it shows.
            sigma = torch.sigmoid(0.5 + 1.2 * torch.randn(batch, generator=generator)).to(device)
            low, high = _GUIDANCE
            guidance = low + (high - low) * torch.rand(batch, generator=generator).to(device)
            real = latents[rows]
            noise = torch.randn(real.shape, generator=generator).to(device)
            share = sigma[:, None, None, None]
            x = (1 - share) * real + share * noise
            found = flow(x, sigma, texts.take(asked), guidance)
            error = functional.mse_loss(found, noise - real)
            optimizer.zero_grad()
            error.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            kept = min(_AVERAGED, step / (step + 10))
            torch._foreach_lerp_(averages, [p.detach() for p in parameters], 1 - kept)
            progress.tell(step, error=error.item())
    with torch.no_grad():
        for parameter, average in zip(parameters, averages, strict=True):
            parameter.copy_(average)
        # The one layer whose halves the model has the other way round, in memory of its own.
        for leaf, parameter in flow.model.get_submodule("norm_out.linear").named_parameters():
            tensors[f"{_SWAPPED}.{leaf}"].copy_(torch.cat([*reversed(parameter.chunk(2))]))
    return {name: tensor.detach().bfloat16() for name, tensor in tensors.items()}


@torch.no_grad()
def draw(tensors: Tensors, text: Text, seeds: list[int], side: int, steps: int) -> Tensor:
    """Latents for the VAE, one for each prompt, as KSampler with euler and simple draws them."""
    flow = Flow({name: tensor.float() for name, tensor in tensors.items()}).eval()
    device = text.context.device
    x = torch.cat([seeded_noise((1, 16, side, side), seed) for seed in seeds]).to(device)
    guidance = torch.full((len(seeds),), 3.5, device=device)
    sigmas = flux_sigmas(steps).to(device)
    for sigma, following in itertools.pairwise(sigmas):
        x = x + (following - sigma) * flow(x, sigma.expand(len(seeds)), text, guidance)
    return to_vae(x)


def _start(seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in flux_layers(SIZES):
        for name, shape in layer.shapes.items():
            if name.endswith(".scale"):
                tensors[name] = torch.ones(shape)
            elif name.endswith(".bias") or "mod" in name or name.startswith("final_layer"):
                # Blocks begin as nothing, and let through what comes in.
                tensors[name] = torch.zeros(shape)
            else:
                tensors[name] = torch.randn(shape, generator=generator) / shape[1] ** 0.5
    return tensors
