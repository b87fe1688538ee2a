"""Prompts to FLUX.1's conditioning, with resident text encoders."""

from __future__ import annotations

from torch import Tensor

from ..models.text_encoder_detection import detect_clip, detect_t5
from .components import OpenComponents
from .text_encoders.clip import ClipEncoder, build_clip
from .text_encoders.t5 import T5Encoder, build_t5


class TextEncoding:
    """Every rank computes it by itself: it takes less time than sharing it would."""

    def __init__(self, components: OpenComponents) -> None:
        self._components = components

    def encode(
        self, clip: str | None, t5: str | None, clip_ids: Tensor, t5_ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Context (B, T, E) of T5 and pooled text (B, P) of CLIP-L, in fp32.

        ``clip`` and ``t5`` are regions, tokens int64: (B, positions or more) for CLIP, of which
        the first window counts as in ComfyUI, and (B, T). Raises MissingComponent, ValueError.
        """
        encoder = self._clip(clip)
        pooled = encoder.encode(clip_ids[:, : encoder.config.positions]).pooled
        return self._t5(t5).encode(t5_ids), pooled

    def _clip(self, region: str | None) -> ClipEncoder:
        component = self._components.find(region, "clip_l")

        def build() -> ClipEncoder:
            config = detect_clip(component.component.tensors, component.component.label)
            return build_clip(config, component.without_prefix(config.prefix))

        return component.build("clip", build)

    def _t5(self, region: str | None) -> T5Encoder:
        component = self._components.find(region, "t5")

        def build() -> T5Encoder:
            config = detect_t5(component.component.tensors, component.component.label)
            return build_t5(config, component.without_prefix(config.prefix))

        return component.build("t5", build)
