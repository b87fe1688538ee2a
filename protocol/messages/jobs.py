"""Work for the ranks: what a client asks over the bulk socket, and what it is answered.

The tensors of a job travel as raw frames behind the message. A tensor that comes again and again
(a prompt's conditioning) is sent once with the digest of its bytes and afterwards named by it; a
digest that the ranks do not have, or no longer, is answered with :class:`Need`, never guessed.
Latents of forwards need not travel at all: they lie in a scratch region of the session.
"""

from __future__ import annotations

from math import prod
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from .. import limits
from ..manifest import DTYPE_BYTES
from .fields import Count, Fingerprint, Message, Name, Role

#: The one tensor that may lie in a scratch region: nothing may be decided by its numbers, as ranks
#: read them one after another, and their owner may write to them meanwhile.
IN_SCRATCH: Final = "x"
Digest = Annotated[bytes, Meta(min_length=32, max_length=32)]
ComputeDtype = Literal["F32", "F16", "BF16"]
RefLatentsMethod = Literal["offset", "index", "uxo"]
_Degree = Annotated[int, Meta(ge=1, le=limits.RANKS)]
_Extent = Annotated[int, Meta(ge=0, le=2**31)]
_Finite = Annotated[float, Meta(ge=-1e6, le=1e6)]
_Pixels = Annotated[int, Meta(ge=16, le=16384)]


class TensorPart(msgspec.Struct, frozen=True, kw_only=True):
    """One tensor of a job or an answer, contiguous and little-endian.

    ``inline``: its bytes are the next raw frames. With a ``digest`` they are kept for the session
    and need not be sent again. ``offset``: its bytes lie there in the job's scratch region.
    """

    name: Name
    dtype: Literal["F32", "F16", "BF16", "I64", "U8"]
    shape: Annotated[list[_Extent], Meta(max_length=limits.DIMENSIONS)]
    digest: Digest | None = None
    inline: bool = True
    offset: Annotated[int, Meta(ge=0, le=limits.SCRATCH)] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor, wherever they are."""
        return prod(self.shape) * DTYPE_BYTES[self.dtype]

    @property
    def frames(self) -> int:
        """Raw frames that its bytes fill: all full but the last, and at least one."""
        return max(1, -(-self.nbytes // limits.BULK_FRAME))


Parts = Annotated[list[TensorPart], Meta(max_length=limits.JOB_TENSORS)]
#: What a job computes with: the role that a component plays in it → the component.
Components = Annotated[dict[Role, Fingerprint], Meta(max_length=limits.JOB_COMPONENTS)]


class Degrees(msgspec.Struct, frozen=True, kw_only=True):
    """Degrees of parallelism; their product is the number of ranks."""

    ulysses: _Degree = 1
    ring: _Degree = 1
    cfg: _Degree = 1
    pipefusion: _Degree = 1


class Adapter(msgspec.Struct, frozen=True):
    """A LoRA of the stack: a component of low-rank pairs, and how strongly it works."""

    fingerprint: Fingerprint
    strength: _Finite = 1.0


Adapters = Annotated[list[Adapter], Meta(max_length=limits.JOB_ADAPTERS)]


class Forward(Message, frozen=True, tag="forward", kw_only=True):
    """ComfyUI's ``diffusion_model`` call. Answered by :class:`Output` with "output".

    Component "transformer". Tensors: "x" (B, C, H, W), "timestep" (B,), "context" (B, T, E), "y"
    (B, P), perhaps "guidance" (B,) and "ref_latents.0"…; sigmas as timestep, guidance unscaled.
    ``run`` tells apart what one session denoises in turns (PipeFusion keeps state for each).
    With a ``scratch`` region of the session "x" may lie in it, and behind it, if there is room, the
    ranks leave the output there.
    """

    components: Components
    tensors: Parts
    compute: ComputeDtype = "BF16"
    fp8_matmul: bool = False  # the blocks' products in e4m3: faster, not exact
    degrees: Degrees | None = None  # None: chosen for the model, the batch and the devices
    adapters: Adapters = msgspec.field(default_factory=list)
    ref_latents_method: RefLatentsMethod = "offset"
    run: Name = ""
    scratch: Count | None = None


class Generate(Message, frozen=True, tag="generate", kw_only=True):
    """A whole picture. Answered by :class:`Step` after each step and :class:`Output` at the end.

    Components "transformer", "vae" for an image, "clip_l" and "t5" for token ids.
    Tensors: "context" and "y", or "clip_l_ids" (B, 77·n) and "t5_ids" (B, T), for cfg other than 1
    the same with "negative_" before; perhaps "latent", "noise", "mask", "sigmas". Outputs:
    "latent", and "image" (B, H, W, 3) in fp32 from 0 to 1 if ``decode``.
    """

    components: Components
    tensors: Parts
    compute: ComputeDtype = "BF16"
    fp8_matmul: bool = False  # as in Forward
    degrees: Degrees | None = None
    adapters: Adapters = msgspec.field(default_factory=list)
    width: _Pixels = 1024  # of the picture, in pixels; a given latent has its own size
    height: _Pixels = 1024
    batch: Annotated[int, Meta(ge=1, le=64)] = 1
    seed: Annotated[int, Meta(ge=0)] = 0  # MessagePack's largest is torch's, 2^64 - 1
    steps: Annotated[int, Meta(ge=1, le=10_000)] = 20
    guidance: _Finite = 3.5  # of distilled models
    cfg: _Finite = 1.0  # 1: no negative prompt
    denoise: Annotated[float, Meta(gt=0, le=1)] = 1.0
    sampler: Name = "euler"
    scheduler: Name = "simple"
    decode: bool = True
    preview: bool = False


class Decode(Message, frozen=True, tag="decode", kw_only=True):
    """Latent "latent" (B, C, h, w) to :class:`Output` "image" (B, H, W, 3), fp32, 0 to 1."""

    components: Components
    tensors: Parts
    compute: ComputeDtype = "BF16"
    tiles: bool = False  # also where it would fit whole


class Encode(Message, frozen=True, tag="encode", kw_only=True):
    """Pictures "image" (B, H, W, 3), fp32, 0 to 1, to :class:`Output` "latent" (B, C, h, w)."""

    components: Components
    tensors: Parts
    compute: ComputeDtype = "BF16"


class EncodeText(Message, frozen=True, tag="encode-text", kw_only=True):
    """Token ids "clip_l_ids" (B, 77·n) and "t5_ids" (B, T) to Output "context" and "y", fp32."""

    components: Components
    tensors: Parts


Job = Forward | Generate | Decode | Encode | EncodeText


def scratch_of(job: Job) -> int | None:
    """The scratch region that a job names; kinds that know none name none."""
    return job.scratch if isinstance(job, Forward) else None


# --- answers --------------------------------------------------------------------------------------


class Output(Message, frozen=True, tag="output"):
    """The job is done; the tensors' frames follow."""

    tensors: Parts = msgspec.field(default_factory=list)


class Step(Message, frozen=True, tag="step", kw_only=True):
    """The job goes on: ``step`` of ``steps`` are done. A preview's frame may follow.

    "preview" is a small picture (h, w, 3), U8; of a job without a VAE it is the latent as the
    transformer knows it, (C, h, w), F32.
    """

    step: Count
    steps: Count
    tensors: Parts = msgspec.field(default_factory=list)  # "preview"


class Need(Message, frozen=True, tag="need"):
    """The ranks do not have the tensors of these digests (any more): send them, then try again."""

    digests: Annotated[list[Digest], Meta(max_length=limits.JOB_TENSORS)]
