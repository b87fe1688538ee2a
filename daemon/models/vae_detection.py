"""From the header of a safetensors file to the sizes of its VAE, or to one clear sentence.

Nothing but names, dtypes and shapes is looked at. Every tensor is checked, so that a file which is
accepted here can be loaded strictly.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...protocol.manifest import TensorSpec
from ...protocol.safetensors_file import SafetensorsFile
from .component_tensors import ComponentTensors
from .vae_config import LATENT_CHANNELS, NORM_GROUPS, VaeConfig
from .vae_layers import vae_layers

WEIGHT_DTYPES = ("F32", "F16", "BF16")
# Before a VAE's tensors in whole checkpoints: CompVis' and ComfyUI's.
PREFIXES = ("first_stage_model.", "vae.")
_SUPPORTED = (
    "supported are VAEs of FLUX.1's kind (ae.safetensors: 16 latent channels, no quant_conv) in "
    "the layout of Black Forest Labs and ComfyUI, in fp32, fp16 or bf16"
)
# What else has a decoder, by parts of its tensors' names.
_OTHERS = (
    ("FLUX.2's VAE", ("bn.running_mean",)),
    ("a VAE in the diffusers layout", ("decoder.up_blocks.", "encoder.down_blocks.")),
    ("a small VAE for previews (TAESD)", ("taesd_decoder.", "taesd_encoder.")),
    ("a VAE that quantises (VQ)", ("quantize.embedding", "vquantizer.")),
    ("Stable Video's VAE", (".mix_factor", "time_stack.")),
    ("Wan's or Qwen-Image's VAE", ("decoder.middle.", "decoder.upsamples.")),
    ("a FLUX.1 transformer, not a VAE", ("double_blocks.",)),
    ("a text encoder, not a VAE", (".SelfAttention.", ".self_attn.", ".resblocks.")),
)


def detect_vae_file(file: SafetensorsFile) -> VaeConfig:
    """The config of the VAE in a file. Raises UnsupportedModel."""
    return detect_vae([tensor.spec for tensor in file.tensors], file.label)


def detect_vae(specs: Sequence[TensorSpec], label: str) -> VaeConfig:
    """The config of the VAE whose tensors these are: of a file, or of a region.

    Where the names have the prefix of whole checkpoints, only those with it count. ``label`` names
    the file in errors. Raises :class:`~.errors.UnsupportedModel` for other VAEs and other models,
    incomplete files, unknown tensors, and shapes or dtypes that FLUX.1's VAE cannot have.
    """
    found = ComponentTensors(
        specs, label, kind="a VAE of FLUX.1's kind", supported=_SUPPORTED, prefixes=PREFIXES
    )
    found.recognise(("encoder.", "decoder."), _OTHERS)
    first = "decoder.conv_in.weight"
    if first in found.by_name and len(found.by_name[first].shape) == 5:
        raise found.refusal("is a VAE for video")
    channels = found.shape(first, 4)[1]
    quantising = any(name.startswith(("quant_conv.", "post_quant_")) for name in found.by_name)
    if channels != LATENT_CHANNELS or quantising:
        kind = "with" if quantising else "without"
        raise found.refusal(f"is a VAE of {channels} latent channels {kind} quant_conv")
    widths = tuple(
        found.shape(f"encoder.down.{level}.block.0.conv1.weight", 4)[0]
        for level in range(found.count("encoder.down."))
    )
    if any(width % NORM_GROUPS for width in widths):
        raise found.refusal(f"has levels of {widths} channels, which {NORM_GROUPS} must divide")
    config = VaeConfig(
        widths=widths,
        blocks=found.count("encoder.down.0.block."),
        latent_channels=channels,
        dtypes=found.dtypes,
        prefix=found.prefix,
        nbytes=found.nbytes,
    )
    shapes = {name: shape for layer in vae_layers(config) for name, shape in layer.shapes.items()}
    found.check(shapes, WEIGHT_DTYPES)
    found.check_the_rest(shapes)
    return config
