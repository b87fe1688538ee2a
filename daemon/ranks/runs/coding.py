"""Decoding, encoding and text encoding: one turn each."""

from __future__ import annotations

from ....protocol import messages as m
from .base import Engines, Place, Run, Tensors, require


class DecodeRun(Run):
    """See :class:`~.base.Run`."""

    def __init__(self, job: m.Decode, tensors: Tensors, place: Place, engines: Engines) -> None:
        self._engines, self._job = engines, job
        self._region = place.region("vae")
        (self._latent,) = require(tensors, "latent")

    def advance(self) -> Tensors:
        """ "image" (B, H, W, 3), fp32, 0 to 1."""
        job = self._job
        image = self._engines.autoencoder.decode(
            self._region, job.compute, self._latent, tiles=job.tiles
        )
        return {"image": image}


class EncodeRun(Run):
    """See :class:`~.base.Run`."""

    def __init__(self, job: m.Encode, tensors: Tensors, place: Place, engines: Engines) -> None:
        self._engines, self._job = engines, job
        self._region = place.region("vae")
        (self._image,) = require(tensors, "image")

    def advance(self) -> Tensors:
        """ "latent" (B, C, h, w), fp32."""
        latent = self._engines.autoencoder.encode(self._region, self._job.compute, self._image)
        return {"latent": latent}


class EncodeTextRun(Run):
    """See :class:`~.base.Run`."""

    def __init__(self, job: m.EncodeText, tensors: Tensors, place: Place, engines: Engines) -> None:
        self._engines, self._place = engines, place
        self._clip_ids, self._t5_ids = require(tensors, "clip_l_ids", "t5_ids")

    def advance(self) -> Tensors:
        """ "context" (B, T, E) and "y" (B, P), fp32."""
        context, pooled = self._engines.texts.encode(
            self._place.region("clip_l"), self._place.region("t5"), self._clip_ids, self._t5_ids
        )
        return {"context": context, "y": pooled}
