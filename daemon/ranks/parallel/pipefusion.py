"""PipeFusion one step at a time, for samplers that are not xfuser's.

The blocks are divided among the stages and the image into patches that flow through them. In a
stale step a patch attends to the keys and values of the other patches from the step before,
which is nearly right because neighbouring steps resemble each other; a warm step takes the whole
image at once and is exact. (PipeFusion: https://arxiv.org/abs/2405.14430)

xfuser gives the groups and the transport. Its own driver is not used: it is bound to its
pipelines, cuts the block lists of the model in place and keeps keys and values for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .attention import Exchange, attend_locally
from .config import ConfigError
from .contexts import ParallelContext
from .kv_store import KvEntry, KvStore, Signature
from .splits import BatchSplit, even_ranges
from .transformer import FluxInputs, ParallelFlux, join_rows


@dataclass(frozen=True)
class StepResult:
    """What a step gave, the same on every rank."""

    output: Tensor  # (B, L, output channels)
    warm: bool  # exact; otherwise computed with keys and values of the step before


@dataclass(frozen=True)
class PatchExchange(Exchange):
    """Attention of one patch over all tokens, the others' keys and values being the kept ones."""

    entry: KvEntry
    block: int  # of this stage's blocks
    start: int  # of the patch, in [text, image]
    keep: bool  # False where nothing will be read again

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `attention.Exchange.attend`."""
        kept = self.entry.layers.get(self.block)
        if kept is not None:
            for whole, patch in zip(kept, (key, value), strict=True):
                whole[:, self.start : self.start + patch.shape[1]] = patch
            key, value = kept
        elif self.keep:
            self.entry.layers[self.block] = key, value
        heads_first = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return attend_locally(*heads_first).transpose(1, 2)


def stage_blocks(blocks: int, stages: int, stage: int) -> tuple[int, int]:
    """The blocks [first, last) of a stage, counted through double and then single blocks.

    A loader that reads it needs no other block on that rank; the embedders belong to all stages.
    Even by number: a double and a single block cost the same per token.
    """
    if blocks < stages:
        raise ConfigError(f"pipefusion={stages} stages for {blocks} blocks: one would be empty")
    return even_ranges(blocks, stages)[stage]


class PipeFusion:
    """Steps of a resident FLUX over the stages of a context, with state between them."""

    def __init__(
        self, flux: ParallelFlux, store: KvStore, *, patches: int = 0, warm_steps: int = 1
    ) -> None:
        """``patches`` of the image in a stale step (0: as many as stages); ``warm_steps`` begin
        each run, 1 or more. Both the same on all ranks. The store is this model's alone."""
        if patches < 0 or warm_steps < 1:
            raise ConfigError(f"{patches} patches, {warm_steps} warm steps: at least 0 and 1")
        self._flux = flux
        self._store = store
        self._patches = patches
        self._warm_steps = warm_steps

    @torch.no_grad()
    def step(
        self,
        context: ParallelContext,
        inputs: FluxInputs,
        *,
        session: str,
        slot: str,
        condition: str,
        adapters: str = "",
        warm: bool = False,
        reserve: Callable[[int], None] | None = None,
    ) -> StepResult:
        """One denoising step, called on all ranks with equal arguments.

        The step is warm if asked for, if ``session`` and ``slot`` have no state, at the first
        ``warm_steps``, when sigma (``inputs.timestep``) repeats, rises or is no number, and when
        shapes, dtype, ``condition`` or ``adapters`` are others than in the last step. Raises
        RuntimeError if a rank stays away past the group's deadline; the state is then forgotten.

        ``reserve`` is told beforehand how many bytes of keys and values the step will keep that
        are not kept yet, on the stage that holds most; it may raise.
        """
        config = context.config
        config.check_model(self._flux.heads, self._flux.blocks)
        if config.sequence > 1:
            raise ConfigError(f"{config}: PipeFusion works with cfg only, not with ulysses or ring")
        context.activate()
        batch = BatchSplit(inputs.hidden_states.shape[0], config.cfg)
        entry = self._entry(context, inputs, batch, session, slot, condition, adapters)
        keep = entry.signature.patches > 1 and self._store.fits(entry)
        if reserve is not None:
            reserve(entry.nbytes if keep and not entry.layers else 0)
        # From the inputs that all ranks have, never from what a rank computed.
        sigma = float(inputs.timestep.max())
        if not sigma < entry.sigma:
            entry.warm_steps = 0  # another run begins, a sampler looks back, or one of both is NaN
        warm = warm or not entry.layers or entry.warm_steps < self._warm_steps
        # Forgotten first: a step that fails leaves keys and values of two steps behind.
        self._store.forget(session, slot)
        if warm:
            entry.layers.clear()
        length = inputs.hidden_states.shape[1]
        spans = [(0, length)] if warm else even_ranges(length, entry.signature.patches)
        stage = _Stage(self._flux.model, context, inputs.take_rows(batch, context.cfg_rank))
        output = join_rows(context, batch, stage.run(spans, entry, keep))
        entry.sigma = sigma
        entry.warm_steps += warm
        self._store.put(session, slot, entry)
        return StepResult(output, warm)

    def forget(self, session: str, slot: str | None = None) -> None:
        """Drop what a run that is over left, or an ended session."""
        self._store.forget(session, slot)

    def forget_others(self, sessions: Container[str]) -> None:
        """Drop what is kept for all sessions but these."""
        self._store.forget_others(sessions)

    def _entry(
        self,
        context: ParallelContext,
        inputs: FluxInputs,
        batch: BatchSplit,
        session: str,
        slot: str,
        condition: str,
        adapters: str,
    ) -> KvEntry:
        image, text = inputs.hidden_states, inputs.encoder_hidden_states
        stages = context.config.pipefusion
        signature = Signature(
            shapes=(tuple(image.shape), tuple(text.shape)),
            dtype=str(image.dtype),
            patches=min(self._patches or stages, image.shape[1]),
            condition=condition,
            # A context of other degrees has other blocks here.
            adapters=f"{context.config}/{adapters}",
        )
        found = self._store.find(session, slot)
        if found is not None and found.signature == signature:
            return found
        first, last = stage_blocks(self._flux.blocks, stages, 0)
        tokens = image.shape[1] + text.shape[1]
        row_bytes = 2 * tokens * int(self._flux.model.inner_dim) * image.element_size()
        return KvEntry(signature, nbytes=(last - first) * batch.piece * row_bytes)


class _Stage:
    """This rank's share of one step."""

    def __init__(self, model: Any, context: ParallelContext, inputs: FluxInputs) -> None:
        self._model = model
        self._group = context.pipeline_group
        self._first = context.stage == 0
        self._last = context.stage == context.config.pipefusion - 1
        self._inputs = inputs
        blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
        start, end = stage_blocks(len(blocks), context.config.pipefusion, context.stage)
        self._blocks = blocks[start:end]
        # In fp32: half precision would round a timestep of 730 to 728.
        given = (inputs.timestep, inputs.guidance)
        times = [time.float() * 1000 for time in given if time is not None]
        self._time = model.time_text_embed(*times, inputs.pooled_projections)
        self._rotation = model.pos_embed(torch.cat([inputs.txt_ids, inputs.img_ids]))

    def run(self, spans: list[tuple[int, int]], entry: KvEntry, keep: bool) -> Tensor:
        """(rows, L, output channels) on every stage, from patches of the image tokens."""
        rows, length, _ = self._inputs.hidden_states.shape
        # Shapes are known, so every receive is posted before anything is computed: a send never
        # waits for a stage that is busy.
        arriving = [] if self._first else [self._receive(span) for span in spans]
        sending: list[tuple[Any, Tensor]] = []
        outputs: list[Tensor] = []
        for number, span in enumerate(spans):
            if self._first:
                tokens = self._embed(span)
            else:
                work, tokens = arriving[number]
                work.wait()
            tokens = self._compute(tokens, span, entry, keep)
            if self._last:
                image = tokens[:, self._text(span) :]
                outputs.append(self._model.proj_out(self._model.norm_out(image, self._time)))
            else:
                tokens = tokens.contiguous()
                # The handle is kept: gloo drops a send together with its handle.
                sending.append((self._group._pipeline_isend(tokens), tokens))
        for work, _ in sending:
            work.wait()
        if self._last:
            output = torch.cat(outputs, dim=1)
        else:
            channels = self._model.proj_out.out_features
            output = self._inputs.hidden_states.new_empty(rows, length, channels)
        if self._group.world_size > 1:
            dist.broadcast(output, self._group.last_rank, group=self._group.device_group)
        return output

    def _text(self, span: tuple[int, int]) -> int:
        # The text belongs to the first patch, so it is computed once per step, not per patch.
        return 0 if span[0] else self._inputs.encoder_hidden_states.shape[1]

    def _embed(self, span: tuple[int, int]) -> Tensor:
        image = self._model.x_embedder(self._inputs.hidden_states[:, slice(*span)])
        if not self._text(span):
            return image  # type: ignore[no-any-return]
        text = self._model.context_embedder(self._inputs.encoder_hidden_states)
        return torch.cat([text, image], dim=1)

    def _receive(self, span: tuple[int, int]) -> tuple[Any, Tensor]:
        image = self._inputs.hidden_states
        tokens = self._text(span) + span[1] - span[0]
        buffer = image.new_empty(image.shape[0], tokens, self._model.inner_dim)
        return self._group._pipeline_irecv(buffer), buffer

    def _compute(self, tokens: Tensor, span: tuple[int, int], entry: KvEntry, keep: bool) -> Tensor:
        text_tokens = self._inputs.encoder_hidden_states.shape[1]
        start = span[0] and text_tokens + span[0]
        rotation = tuple(table[start : text_tokens + span[1]] for table in self._rotation)
        text, image = tokens[:, : self._text(span)], tokens[:, self._text(span) :]
        for number, block in enumerate(self._blocks):
            exchange = PatchExchange(entry, number, start, keep)
            text, image = block(
                hidden_states=image,
                encoder_hidden_states=text,
                temb=self._time,
                image_rotary_emb=rotation,
                joint_attention_kwargs={"exchange": exchange},
            )
        return torch.cat([text, image], dim=1)
