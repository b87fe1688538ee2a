"""The attention of FLUX blocks; what differs between ways of parallelism is left open."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..kernels.joined_mlp import make_room
from ..kernels.plain import Projected
from ..kernels.rotated_heads import rotate_heads
from .attention_backend import choose_backend
from .splits import TokenSplit
from .ulysses import HeadExchange, Make, begin_by_heads, pack


class Exchange:
    """How the tokens that a rank has see all the tokens there are."""

    @property
    def by_heads(self) -> HeadExchange | None:
        """What does it step by step, if that is how it is done."""
        return None

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of ``query`` over everything; all (batch, own tokens, heads, head size)."""
        raise NotImplementedError

    def begin(self, query: Make, key: Make, value: Make, of: Sequence[Tensor]) -> Tensor:
        """Attention as soon as each tensor is made; nothing but :meth:`finish` may look at it.

        ``of``: what they are made of, one or two tensors.
        """
        return self.attend(query(1)[0], key(1)[0], value(1)[0])

    def finish(self, begun: Tensor, after: Tensor | None = None, room: int = 0) -> Tensor:
        """(batch, own tokens, width + room): what :meth:`attend` gives, of what :meth:`begin` gave.

        ``after``: what is to be computed while it is under way; ``room``: columns behind for
        others, which are not set.
        """
        return make_room(begun, room)


Kernel = Callable[..., tuple[Tensor, ...]]


def local_kernel(dtype: torch.dtype, device: torch.device, head_size: int) -> Kernel:
    """The kernel that xfuser would take without sequence parallelism."""
    from xfuser.core.distributed.attention_backend import (
        ATTENTION_FUNCTION_REGISTRY,
        AttentionBackendType,
    )

    name = choose_backend(dtype, device, 1, head_size)
    kernel: Kernel = ATTENTION_FUNCTION_REGISTRY[AttentionBackendType[name]]
    return kernel


def attend_locally(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention within this rank; all (batch, heads, tokens, head size), any dtype.

    By :func:`local_kernel`. Queries may be fewer than keys.
    """
    kernel = local_kernel(query.dtype, query.device, query.shape[-1])
    return kernel(query, key, value, 0.0, False)[0]


@dataclass(frozen=True)
class LocalExchange(Exchange):
    """No exchange: the rank has all tokens. Without a ``kernel`` one is chosen at each call."""

    kernel: Kernel | None = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `Exchange.attend`."""
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        if self.kernel is None:
            return attend_locally(query, key, value).transpose(1, 2)
        return self.kernel(query, key, value, 0.0, False)[0].transpose(1, 2)


@dataclass(frozen=True)
class SequenceExchange(Exchange):
    """Ulysses and ring, exact for every length, by xfuser's USP or, without a ring, `ulysses`.

    A rank's tokens lie as [text shard, text rest, image shard, image rest]. The shards are
    exchanged; the rests, which every rank has, go through USP's joint arguments: as queries each
    rank computes them, as keys they count once. (USP: https://arxiv.org/abs/2405.07719)
    """

    text: TokenSplit
    image: TokenSplit
    ring: int
    make_heads: Callable[[], HeadExchange]

    @cached_property
    def by_heads(self) -> HeadExchange | None:
        """Where every rank has as many tokens, and there is no ring."""
        shares = self.text.shard or self.image.shard
        if self.ring > 1 or not shares or self.text.rest or self.image.rest:
            return None
        return self.make_heads()

    def begin(self, query: Make, key: Make, value: Make, of: Sequence[Tensor]) -> Tensor:
        """See `Exchange.begin`."""
        if self.by_heads is None:
            return super().begin(query, key, value, of)
        return begin_by_heads(self.by_heads, self.image.ways, query, key, value, of)

    def finish(self, begun: Tensor, after: Tensor | None = None, room: int = 0) -> Tensor:
        """See `Exchange.finish`."""
        if self.by_heads is None:
            return super().finish(begun, room=room)
        return self.by_heads.receive(begun, room=room)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `Exchange.attend`; by USP, of which `begin` makes no use where it is by heads."""
        from xfuser.core.distributed.attention_backend import AttentionBackendType
        from xfuser.model_executor.layers.usp import USP

        if not self.text.shard and not self.image.shard:
            # Fewer tokens than ranks, in both streams: every rank has all of them already.
            return LocalExchange().attend(query, key, value)
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        name = choose_backend(query.dtype, query.device, self.ring, query.shape[-1])
        backend = AttentionBackendType[name]
        if not self.text.rest and not self.image.rest:
            output: Tensor = USP(query, key, value, combine_qkv_a2a=True, backend=backend)
        else:
            own, shared = zip(*(self._part(tensor) for tensor in (query, key, value)), strict=True)
            output = USP(
                *own,
                joint_query=shared[0],
                joint_key=shared[1],
                joint_value=shared[2],
                joint_strategy="front",
                backend=backend,
            )
            output = self._reassemble(output)
        return output.transpose(1, 2)

    def _part(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        sizes = [self.text.shard, self.text.rest, self.image.shard, self.image.rest]
        text, text_rest, image, image_rest = torch.split(tokens, sizes, dim=2)
        return torch.cat([text, image], 2), torch.cat([text_rest, image_rest], 2)

    def _reassemble(self, tokens: Tensor) -> Tensor:
        sizes = [self.text.rest, self.image.rest, self.text.shard, self.image.shard]
        text_rest, image_rest, text, image = torch.split(tokens, sizes, dim=2)
        return torch.cat([text, text_rest, image, image_rest], 2)


class FluxExchangeProcessor:
    """An attention processor for diffusers' FLUX that leaves the attention itself to an `Exchange`.

    The exchange comes with each call through ``joint_attention_kwargs``; without one the rank is
    taken to have all tokens, so the model stays usable as it is. Stateless: one serves all layers
    of all models.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        exchange: Exchange | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Hidden (batch, image, D), text (batch, text, D) or None where both are in hidden.

        The rotation is diffusers' pair (cosine, sine), each (all tokens here, head size), fp32.
        """
        if attention_mask is not None:
            raise ValueError("FLUX attention over several ranks takes no mask: leave it out")
        exchange = exchange or LocalExchange()
        begun = begin_attention(
            attn, hidden_states, encoder_hidden_states, image_rotary_emb, exchange
        )
        output = exchange.finish(begun).to(hidden_states.dtype)
        if encoder_hidden_states is None:
            return output
        length = encoder_hidden_states.shape[1]
        of_text, of_image = output[:, :length].contiguous(), output[:, length:].contiguous()
        return attn.to_out[1](attn.to_out[0](of_image)), attn.to_add_out(of_text)


def begin_attention(
    attn: Any,
    image: Tensor,
    text: Tensor | None,
    rotation: tuple[Tensor, Tensor],
    exchange: Exchange,
) -> Tensor:
    """What `Exchange.begin` gives for a ``FluxAttention`` of diffusers.

    Projections, norms and rotation follow its ``FluxAttnProcessor``; each is made when the
    exchange asks for it. Arguments as in `FluxExchangeProcessor`.
    """

    def project(layer: str, norm: str, tokens: Tensor) -> Projected:
        weight = getattr(attn, norm).weight
        return Projected(getattr(attn, layer)(tokens), weight.to(tokens.dtype))

    def rotated(name: str) -> Make:
        def make(ways: int) -> Tensor:
            of_image = project(f"to_{name}", f"norm_{name}", image)
            of_text = None
            if text is not None:
                of_text = project(f"add_{name}_proj", f"norm_added_{name}", text)
            return rotate_heads(of_image, of_text, rotation, ways, attn.norm_q.eps)

        return make

    def value(ways: int) -> Tensor:
        values = attn.to_v(image)
        if text is not None:
            values = torch.cat([attn.add_v_proj(text), values], dim=1)
        return pack(values.unflatten(-1, (-1, attn.head_dim)), ways)

    of = (image,) if text is None else (image, text)
    return exchange.begin(rotated("q"), rotated("k"), value, of)
