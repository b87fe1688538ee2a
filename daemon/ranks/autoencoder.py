"""Decoding and encoding pictures with a resident VAE, decoding over all ranks."""

from __future__ import annotations

from torch import Tensor

from ...protocol import messages as m
from ...protocol.errors import OutOfMemory
from ..models.vae_config import VaeConfig
from ..models.vae_detection import detect_vae
from ..models.vae_memory import TILE, decode_bytes
from .components import OpenComponent, OpenComponents
from .dtypes import DTYPES
from .parallel.process_group import RankGroup
from .reservation import Reservation
from .vae.model import Vae, build_vae
from .vae.parallel_decode import ParallelDecoder
from .vae.preview import LatentPreview


class Autoencoder:
    """All ranks of a group call it with equal arguments, in the same order."""

    def __init__(
        self, group: RankGroup, components: OpenComponents, reservation: Reservation
    ) -> None:
        self._group = group
        self._components = components
        self._reservation = reservation

    def decode(
        self, region: str | None, compute: m.ComputeDtype, latent: Tensor, *, tiles: bool = False
    ) -> Tensor:
        """(B, C, h, w) to (B, H, W, 3), fp32 from 0 to 1, on every rank.

        In tiles where the whole does not fit. Raises ValueError for other shapes, MissingComponent,
        OutOfMemory if not even tiles fit.
        """
        component, vae = self._vae(region, compute)
        if latent.ndim != 4:
            raise ValueError(f"a latent of shape {tuple(latent.shape)}: give (batch, C, h, w)")
        tiles = tiles or not self._fits(vae.config, compute, *latent.shape[2:])
        if tiles:
            size = [min(TILE, side) for side in latent.shape[2:]]
            self._reserve(vae.config, compute, *size)
        decoder = component.build(("decoder", compute), lambda: ParallelDecoder(vae))
        return decoder.decode(latent.to(vae.device), tiles=tiles)

    def encode(self, region: str | None, compute: m.ComputeDtype, image: Tensor) -> Tensor:
        """(B, H, W, 3) from 0 to 1 to fp32 (B, C, h, w); every rank computes it."""
        _, vae = self._vae(region, compute)
        if image.ndim == 4:
            self._reserve(
                vae.config, compute, *(side // vae.config.ratio for side in image.shape[1:3])
            )
        return vae.encode(image)

    def ratio(self, region: str | None, compute: m.ComputeDtype) -> int:
        """Pixels of a picture per latent pixel."""
        return self._vae(region, compute)[1].config.ratio

    def preview(self, region: str | None, compute: m.ComputeDtype, latent: Tensor) -> Tensor:
        """The first latent of a batch at a glance, (h, w, 3), U8, in host memory."""
        component, vae = self._vae(region, compute)
        colours = component.build(("preview", compute), lambda: LatentPreview.fit(vae))
        return colours.preview(latent[0])

    def _vae(self, region: str | None, compute: m.ComputeDtype) -> tuple[OpenComponent, Vae]:
        component = self._components.find(region, "vae")

        def build() -> Vae:
            config = detect_vae(component.component.tensors, component.component.label)
            return build_vae(config, component.without_prefix(config.prefix), DTYPES[compute])

        return component, component.build(("vae", compute), build)

    def _fits(self, config: VaeConfig, compute: m.ComputeDtype, height: int, width: int) -> bool:
        try:
            self._reserve(config, compute, height, width)
        except OutOfMemory:
            return False
        return True

    def _reserve(self, config: VaeConfig, compute: m.ComputeDtype, height: int, width: int) -> None:
        # Each rank has a band of the picture.
        nbytes = decode_bytes(config, height, width, compute) // self._group.world_size
        what = f"decoding {height * config.ratio} x {width * config.ratio} pixels"
        self._reservation.check(nbytes, what)
