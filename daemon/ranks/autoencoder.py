"""Decoding and encoding pictures with a resident VAE, decoding over all ranks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...protocol import messages as m
from ...protocol.errors import OutOfMemory
from ...protocol.manifest import DTYPE_BYTES
from ..models.vae_config import IMAGE_CHANNELS, VaeConfig
from ..models.vae_detection import detect_vae
from ..models.vae_memory import TILE, decode_bytes
from .components import OpenComponent, OpenComponents
from .dtypes import DTYPES
from .outputs import check_output
from .parallel.process_group import RankGroup
from .reservation import Reservation
from .vae.model import Vae, build_vae, check_images, check_latent
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
        """(B, C, h, w) to (B, H, W, 3), fp32 from 0 to 1, on rank 0; any tensor on the others.

        In tiles where the whole does not fit. Raises ValueError for other shapes, MissingComponent,
        TooLarge, OutOfMemory if not even tiles fit.
        """
        component, vae = self._vae(region, compute)
        check_latent(vae.config, latent)  # by all ranks, where one alone decodes, too
        self.check_size(region, compute, latent.shape)
        # Each rank has a band of the picture.
        ways = self._group.world_size if self._can_share else 1
        height, width = latent.shape[2:]
        tiles = tiles or not self._fits(vae.config, compute, height, width, ways)
        if tiles:
            self._reserve(vae.config, compute, min(TILE, height), min(TILE, width), ways)
        if self._can_share:
            decoder = component.build(("decoder", compute), lambda: ParallelDecoder(vae))
            return decoder.decode(latent.to(vae.device), tiles=tiles)
        if self._group.rank:
            return latent
        return vae.decode(latent.to(vae.device), tiles=tiles)

    def encode(self, region: str | None, compute: m.ComputeDtype, image: Tensor) -> Tensor:
        """(B, H, W, 3) from 0 to 1 to fp32 (B, C, h, w) on rank 0; any tensor on the others."""
        _, vae = self._vae(region, compute)
        check_images(vae.config, image)
        height, width = (side // vae.config.ratio for side in image.shape[1:3])
        self._reserve(vae.config, compute, height, width, 1)
        return image if self._group.rank else vae.encode(image)

    def check_size(self, region: str | None, compute: m.ComputeDtype, shape: Sequence[int]) -> None:
        """Raise TooLarge if the picture of a latent of ``shape`` (B, C, h, w) cannot be sent."""
        rows, _, height, width = shape
        pixels = rows * height * width * self.ratio(region, compute) ** 2
        check_output("image", pixels * IMAGE_CHANNELS * DTYPE_BYTES["F32"])

    @property
    def _can_share(self) -> bool:
        """Whether the ranks can exchange borders: gloo sends host memory only."""
        group = self._group
        return group.world_size > 1 and (group.backend == "nccl" or group.device.type == "cpu")

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

    def _fits(
        self, config: VaeConfig, compute: m.ComputeDtype, height: int, width: int, ways: int
    ) -> bool:
        try:
            self._reserve(config, compute, height, width, ways)
        except OutOfMemory:
            return False
        return True

    def _reserve(
        self, config: VaeConfig, compute: m.ComputeDtype, height: int, width: int, ways: int
    ) -> None:
        nbytes = decode_bytes(config, height, width, compute) // ways
        what = f"{height * config.ratio} x {width * config.ratio} pixels and the VAE"
        # Alone, rank 0 has the device to itself.
        self._reservation.check(nbytes, what, alone=ways == 1)
