"""The attention of FLUX blocks; what differs between ways of parallelism is left open."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import _get_qkv_projections
from torch import Tensor

from .attention_backend import choose_backend
from .process_group import sequence_groups
from .splits import TokenSplit
from .ulysses import attend_by_heads, pack, unpack_output


class Exchange(Protocol):
    """How the tokens that a rank has see all the tokens there are."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of ``query`` over everything; all (batch, own tokens, heads, head size)."""
        ...


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
class LocalExchange:
    """No exchange: the rank has all tokens. Without a ``kernel`` one is chosen at each call."""

    kernel: Kernel | None = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `Exchange.attend`."""
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        if self.kernel is None:
            return attend_locally(query, key, value).transpose(1, 2)
        return self.kernel(query, key, value, 0.0, False)[0].transpose(1, 2)


@dataclass(frozen=True)
class SequenceExchange:
    """Ulysses and ring, exact for every length, by xfuser's USP or, without a ring, `ulysses`.

    A rank's tokens lie as [text shard, text rest, image shard, image rest]. The shards are
    exchanged; the rests, which every rank has, go through USP's joint arguments: as queries each
    rank computes them, as keys they count once. (USP: https://arxiv.org/abs/2405.07719)
    """

    text: TokenSplit
    image: TokenSplit
    ring: int

    @property
    def by_heads(self) -> bool:
        """Whether :meth:`attend_packed` will do."""
        shares = self.text.shard or self.image.shard
        return bool(self.ring == 1 and shares and not self.text.rest and not self.image.rest)

    def attend_packed(self, packed: Tensor) -> Tensor:
        """As :func:`.ulysses.attend_by_heads`."""
        return attend_by_heads(packed, sequence_groups().ULYSSES_PG, LocalExchange().attend)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `Exchange.attend`."""
        from xfuser.core.distributed.attention_backend import AttentionBackendType
        from xfuser.model_executor.layers.usp import USP

        if not self.text.shard and not self.image.shard:
            # Fewer tokens than ranks, in both streams: every rank has all of them already.
            return LocalExchange().attend(query, key, value)
        if self.by_heads:
            return unpack_output(self.attend_packed(pack(query, key, value, self.image.ways)))
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
    of all models. Projections, norms and rotation follow ``FluxAttnProcessor`` of diffusers.
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
        projected = _get_qkv_projections(attn, hidden_states, encoder_hidden_states)
        query, key, value = (t.unflatten(-1, (-1, attn.head_dim)) for t in projected[:3])
        query, key = attn.norm_q(query), attn.norm_k(key)
        if encoder_hidden_states is not None:
            text = (t.unflatten(-1, (-1, attn.head_dim)) for t in projected[3:])
            text_query, text_key, text_value = text
            query = torch.cat([attn.norm_added_q(text_query), query], dim=1)
            key = torch.cat([attn.norm_added_k(text_key), key], dim=1)
            value = torch.cat([text_value, value], dim=1)
        if image_rotary_emb is not None:
            query = apply_rotary_emb(query, image_rotary_emb, sequence_dim=1)
            key = apply_rotary_emb(key, image_rotary_emb, sequence_dim=1)
        output = (exchange or LocalExchange()).attend(query, key, value)
        output = output.flatten(2, 3).to(query.dtype)
        if encoder_hidden_states is None:
            return output
        length = encoder_hidden_states.shape[1]
        of_text, of_image = output[:, :length].contiguous(), output[:, length:].contiguous()
        return attn.to_out[1](attn.to_out[0](of_image)), attn.to_add_out(of_text)
