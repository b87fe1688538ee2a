"""The sentences of a plan: why this dtype, why these degrees, and what would help."""

from __future__ import annotations

from ...protocol.health.units import human_bytes
from ..gpus import Links
from ..ranks.parallel.config import ParallelConfig

_SHOWN_DTYPES = {
    "F32": "fp32",
    "F16": "fp16",
    "BF16": "bf16",
    "F8_E4M3": "fp8 (e4m3)",
    "F8_E5M2": "fp8 (e5m2)",
}
_WHY_DTYPE = {
    "F32": "the weights are used where they lie, but a bf16 file would be half as large and is "
    "what FLUX.1 was published in",
    "F16": "the weights are used where they lie, without a copy or another rounding",
    "BF16": "the weights are used where they lie, without a copy or another rounding",
}
_WHY_LINKS = {
    "nvlink": "links: every pair of GPUs has NVLink, so the ranks' exchange costs little",
    "peer": "links: the GPUs read each other's memory, not every pair over NVLink, so expect less "
    "of further ranks than with NVLink",
    "none": "links: not all GPUs can read each other's memory, so NCCL goes through host memory: "
    "compare with one rank before you rely on more",
    "unknown": "links: not looked at, NVML does not answer or the GPUs are assumed",
}

OPTION_FP8 = "the fp8 file of this model"
OPTION_HOST = "the text encoders in host memory (--text-encoders cpu)"
OPTION_ALL = "all of these at once"
NO_OPTION = "nothing that is known here would save memory: use GPUs with more"


def show_dtype(dtype: str) -> str:
    """A safetensors dtype as people write it: "bf16", "fp8 (e4m3)"."""
    return _SHOWN_DTYPES.get(dtype, dtype)


def why_dtype(stored: str, compute: str) -> str:
    """Why the weights stay as they are stored, and what is computed in."""
    if stored == compute:
        return f"dtype: {show_dtype(stored)} as stored: {_WHY_DTYPE[stored]}"
    return (
        f"dtype: {show_dtype(stored)} as stored, computed in {show_dtype(compute)}: half the bytes "
        "of a 16-bit file, and each layer is cast when it is used, one at a time"
    )


def why_degrees(degrees: ParallelConfig, heads: int, rows: int, used: int, found: int) -> str:
    """Why the ranks share one forward in this way."""
    parts = []
    if degrees.cfg > 1:
        parts.append(
            f"cfg {degrees.cfg} because the {rows} rows of the batch meet only at the forward's end"
        )
    if degrees.ulysses > 1:
        parts.append(
            f"ulysses {degrees.ulysses} because that many ranks can share the {heads} heads evenly"
        )
    if degrees.ring > 1:
        parts.append(
            f"ring {degrees.ring} because {heads} heads cannot be shared evenly by all "
            f"{degrees.sequence} ranks"
        )
    reason = "; ".join(parts) or "one rank computes the whole forward"
    if used < found:
        reason += f"; on {used} of {found} GPUs because it does not fit on the others"
    return f"degrees: {reason}"


def why_links(degrees: ParallelConfig, links: Links) -> list[str]:
    """What the ranks' exchange goes through; nothing to say for one rank."""
    return [_WHY_LINKS[links]] if degrees.world_size > 1 else []


def why_companions(companions: int, copied: int) -> str:
    """What lies beside the transformer; ``copied``: bytes of text encoders in host memory."""
    if not companions:
        return (
            "VAE and text encoders: not counted, because this model takes none of FLUX.1's own "
            "text encoders"
        )
    what = "the VAE" if copied else "VAE, T5-XXL and CLIP-L"
    text = f"VAE and text encoders: {what} in 16 bits ({human_bytes(companions)}) on each GPU"
    if copied:
        text += (
            f"; the text encoders stay in host memory, and a rank that encodes a prompt has a copy "
            f"of them on its GPU ({human_bytes(copied)}, counted with the activations), which it "
            "gives up for the forwards"
        )
    return text


def why_tiles(tiles: bool, whole: int) -> list[str]:
    """Why the picture is decoded piece by piece, ``whole`` bytes of a rank being too many."""
    if not tiles:
        return []
    return [
        f"decoding: in tiles, because the whole picture would take {human_bytes(whole)} at once"
    ]


def option_size(width: int, height: int) -> str:
    """The advice to make a smaller picture."""
    return f"a smaller picture (--size {width}x{height})"


def option_gpus(count: int) -> str:
    """The advice to share the work among more ranks."""
    return f"{count} such GPUs (each has all weights, they share the activations)"
