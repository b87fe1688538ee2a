"""A resident FLUX transformer whose forward is shared by the ranks of a context."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .attention import (
    Exchange,
    FluxExchangeProcessor,
    LocalExchange,
    SequenceExchange,
    local_kernel,
)
from .config import ConfigError
from .contexts import ParallelContext
from .rotation import KeptRotations
from .single_block import OverlappingSingleBlock
from .splits import BatchSplit, TokenSplit


@dataclass(frozen=True)
class FluxInputs:
    """What FLUX is given for one forward; the same, and complete, on every rank.

    B rows, L image tokens, T text tokens; D, E and P are the model's ``in_channels``,
    ``joint_attention_dim`` and ``pooled_projection_dim``. On the rank's device but for the
    positions, which are in host memory; tokens and pooled text are of the dtype that the model
    computes in, timestep and guidance fp32.
    """

    hidden_states: Tensor  # (B, L, D): the packed latent
    encoder_hidden_states: Tensor  # (B, T, E)
    pooled_projections: Tensor  # (B, P)
    timestep: Tensor  # (B,) or (1,): sigma, 0 to 1
    img_ids: Tensor  # (L, 3): positions
    txt_ids: Tensor  # (T, 3)
    guidance: Tensor | None = None  # (B,) or (1,), for guidance-distilled models

    def __post_init__(self) -> None:
        rows = self.hidden_states.shape[0]
        for name in ("encoder_hidden_states", "pooled_projections"):
            if getattr(self, name).shape[0] != rows:
                found = tuple(getattr(self, name).shape)
                raise ValueError(f"{name} has shape {found}, but the batch has {rows} rows")
        for ids, tokens in (("img_ids", "hidden_states"), ("txt_ids", "encoder_hidden_states")):
            expected = (getattr(self, tokens).shape[1], 3)
            if getattr(self, ids).shape != expected:
                found = tuple(getattr(self, ids).shape)
                raise ValueError(f"{ids} has shape {found}; {tokens} needs {expected}")
            if not expected[0]:
                raise ValueError(f"{tokens} has no tokens; at least one is needed")

    def take_rows(self, split: BatchSplit, rank: int) -> FluxInputs:
        """The rows of one cfg rank."""
        if split.ways == 1:
            return self
        of_rank: dict[str, Any] = {
            name: split.take(getattr(self, name), rank)
            for name in (
                *("hidden_states", "encoder_hidden_states", "pooled_projections"),
                *("timestep", "guidance"),
            )
        }
        return FluxInputs(**of_rank, img_ids=self.img_ids, txt_ids=self.txt_ids)

    def take_tokens(self, image: TokenSplit, text: TokenSplit) -> FluxInputs:
        """One rank's share of the tokens of these rows."""
        return replace(
            self,
            hidden_states=image.take(self.hidden_states, 1),
            encoder_hidden_states=text.take(self.encoder_hidden_states, 1),
            img_ids=image.take(self.img_ids, 0),
            txt_ids=text.take(self.txt_ids, 0),
        )


#: Of the tokens that are given; the exchange is None where these are all tokens of their rows.
Compute = Callable[[FluxInputs, Exchange | None], Tensor]


class ParallelFlux:
    """A diffusers ``FluxTransformer2DModel`` for any context.

    The model is not copied and its parameters are not touched: only the attention processors and
    the order within single blocks are replaced, by what computes the same where no exchange is
    asked for, and the rotary embedding, by one that remembers.
    """

    def __init__(self, model: Any) -> None:
        """``model`` is a FluxTransformer2DModel, in eval mode, its weights on the device."""
        self.model = model
        self.rotations = KeptRotations(model.pos_embed, next(model.parameters()).device)
        model.pos_embed = self.rotations
        processor = FluxExchangeProcessor()
        for block in (*model.transformer_blocks, *model.single_transformer_blocks):
            block.attn.set_processor(processor)
        for block in model.single_transformer_blocks:
            block.__class__ = OverlappingSingleBlock

    @property
    def heads(self) -> int:
        """Attention heads of every block."""
        return int(self.model.config.num_attention_heads)

    @property
    def blocks(self) -> int:
        """Double and single blocks together."""
        return len(self.model.transformer_blocks) + len(self.model.single_transformer_blocks)

    @torch.no_grad()
    def forward(
        self,
        context: ParallelContext,
        inputs: FluxInputs,
        compute: Compute | None = None,
    ) -> Tensor:
        """The model's prediction, (B, L, output channels), the same on every rank.

        All ranks of the context call it with equal inputs. Exact for every length, batch and
        degree: it differs from the single process by rounding alone. ``compute`` stands in for
        :meth:`compute`. Raises ConfigError if the model cannot be split that way, RuntimeError if
        a rank stays away past the group's deadline.
        """
        config = context.config
        config.check_model(self.heads, self.blocks)
        if config.pipefusion > 1:
            raise ConfigError(f"{config} keeps state between steps: call PipeFusion.step")
        context.activate()
        compute = compute or self.compute
        batch = BatchSplit(inputs.hidden_states.shape[0], config.cfg)
        rows = inputs.take_rows(batch, context.cfg_rank)
        if config.sequence == 1:
            return join_rows(context, batch, compute(rows, None))
        image = TokenSplit(rows.hidden_states.shape[1], config.sequence, context.sequence_rank)
        text = TokenSplit(rows.encoder_hidden_states.shape[1], config.sequence, image.rank)
        share = rows.take_tokens(image, text)
        make_heads = partial(context.make_heads, self._packed_bytes(share))
        own = compute(share, SequenceExchange(text, image, config.ring, make_heads))
        return join_rows(context, batch, _join_tokens(context, image, own))

    @torch.no_grad()
    def compute(self, rows: FluxInputs, exchange: Exchange | None = None) -> Tensor:
        """The model's prediction of these tokens: all of the rows, or a share with an exchange."""
        tokens = rows.hidden_states
        if exchange is None:
            # Chosen out here: a compiler cannot follow how.
            size = self.model.config.attention_head_dim
            exchange = LocalExchange(local_kernel(tokens.dtype, tokens.device, size))
        output: Tensor = self.model(
            **vars(rows), joint_attention_kwargs={"exchange": exchange}, return_dict=False
        )[0]
        return output

    def _packed_bytes(self, share: FluxInputs) -> int:
        """Of a query, key or value of a rank's tokens."""
        rows, image, _ = share.hidden_states.shape
        tokens = rows * (image + share.encoder_hidden_states.shape[1])
        size = self.model.config.attention_head_dim * share.hidden_states.element_size()
        return int(tokens * self.heads * size)


def _join_tokens(context: ParallelContext, image: TokenSplit, own: Tensor) -> Tensor:
    if image.ways == 1:
        return own
    pieces = context.sequence_group.all_gather(own.contiguous(), dim=1).chunk(image.ways, dim=1)
    # Each rank's rest differs in the last bit with a ring, which adds up in another order on each
    # rank: all take the first rank's, so that ranks that go on computing do not drift apart.
    shards = [piece[:, : image.shard] for piece in pieces]
    return torch.cat([*shards, pieces[0][:, image.shard :]], dim=1)


def join_rows(context: ParallelContext, batch: BatchSplit, rows: Tensor) -> Tensor:
    """The whole batch from each cfg rank's rows, on every rank."""
    if batch.ways == 1:
        return rows
    return batch.join(context.cfg_group.all_gather(rows.contiguous(), dim=0))
