"""The VAE apart from its numbers: tiles, previews, full-size names, and what is refused."""

from __future__ import annotations

import pytest
import torch
from ranks.components.component_files import SmallVae, hollow, random_weights, specs_of
from xdit_sidecar.daemon.models.vae_detection import detect_vae
from xdit_sidecar.daemon.models.vae_layers import vae_layers
from xdit_sidecar.daemon.ranks.vae import model as vae_model
from xdit_sidecar.daemon.ranks.vae.model import Vae, build_vae, empty_vae
from xdit_sidecar.daemon.ranks.vae.preview import LatentPreview
from xdit_sidecar.daemon.ranks.vae.tiles import decode_in_tiles

SMALL = SmallVae(multipliers=(1, 1, 2))
WEIGHTS = random_weights(SMALL.shapes())


@pytest.fixture(scope="module")
def vae() -> Vae:
    return build_vae(detect_vae(specs_of(WEIGHTS), "small"), WEIGHTS, torch.float32)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_every_full_size_parameter_has_its_tensor() -> None:
    config = detect_vae(hollow(SmallVae(128, (1, 2, 4, 4), 2).shapes()), "ae")
    model = empty_vae(config)
    shapes = {}
    for layer in vae_layers(config):
        weight, bias = layer.shapes.values()
        shapes[f"{layer.target}.weight"] = weight[:2] if layer.linear else weight
        shapes[f"{layer.target}.bias"] = bias
    assert shapes == {name: list(p.shape) for name, p in model.named_parameters()}
    assert not model.config.force_upcast


def test_tensors_are_all_used_and_all_needed() -> None:
    config = detect_vae(specs_of(WEIGHTS), "small")
    missing = dict(WEIGHTS)
    name, _ = missing.popitem()
    with pytest.raises(ValueError, match=f"the tensor {name} is missing"):
        build_vae(config, missing, torch.float32)
    with pytest.raises(ValueError, match="the tensor other is unknown"):
        build_vae(config, {**WEIGHTS, "other": torch.zeros(1)}, torch.float32)
    with pytest.raises(RuntimeError, match="size mismatch"):
        build_vae(config, {**WEIGHTS, name: torch.zeros(7)}, torch.float32)
    with pytest.raises(ValueError, match=r"cannot compute in torch\.float64"):
        build_vae(config, WEIGHTS, torch.float64)


def test_shapes(vae: Vae) -> None:
    assert vae.cast_layers == 0
    assert vae.shared_bytes == vae.config.nbytes
    assert vae.decode(noise(2, 16, 3, 1)).shape == (2, 12, 4, 3)
    assert vae.decode(noise(0, 16, 3, 1)).shape == (0, 12, 4, 3)
    assert vae.encode(torch.rand(0, 13, 4, 3)).shape == (0, 16, 3, 1)
    for wrong in (noise(16, 3, 1), noise(1, 4, 3, 1), noise(1, 16, 0, 1)):
        with pytest.raises(ValueError, match="this VAE takes"):
            vae.decode(wrong)
    bytes_ = torch.zeros((1, 9, 9, 3), dtype=torch.uint8)
    for wrong in (torch.rand(9, 9, 3), torch.rand(1, 9, 9, 4), torch.rand(1, 3, 9, 3), bytes_):
        with pytest.raises(ValueError, match="sides of at least 4"):
            vae.encode(wrong)


def test_pictures_are_between_0_and_1(vae: Vae) -> None:
    picture = vae.decode(noise(1, 16, 4, 4) * 50)
    assert (picture.min(), picture.max()) == (0, 1)


def test_tiles(vae: Vae, monkeypatch: pytest.MonkeyPatch) -> None:
    latent = noise(1, 16, 30, 9).cumsum(2) / 8
    whole = vae.decode(latent)
    # ComfyUI's size of tiles: this one latent fits into one.
    torch.testing.assert_close(vae.decode(latent, tiles=True), whole, rtol=0, atol=1e-6)
    monkeypatch.setattr(vae_model, "TILE", 16)
    monkeypatch.setattr(vae_model, "TILE_OVERLAP", 4)
    tiled = vae.decode(latent, tiles=True)
    assert tiled.shape == whole.shape
    difference = (tiled - whole).abs().mean()
    assert 0 < difference < 0.6 * (whole - whole.mean()).abs().mean()


def test_tiles_are_small_and_seamless() -> None:
    seen = []

    def decode(latent: torch.Tensor) -> torch.Tensor:
        seen.append(latent.shape[2:])
        return latent[:, :3].repeat_interleave(2, 2).repeat_interleave(2, 3)

    latent = noise(1, 16, 21, 33)
    image = decode_in_tiles(latent, decode, 2, tile=8, overlap=3)
    assert max(height * width for height, width in seen) == 64
    assert {max(shape) for shape in seen} <= set(range(4, 17))
    # What each tile decodes alike comes out as if there were none.
    torch.testing.assert_close(image, decode(latent), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="tiles of 8 cannot overlap by 4"):
        decode_in_tiles(latent, decode, 2, tile=8, overlap=4)


def test_preview() -> None:
    # A decoder like a trained one: a pixel's colour comes from its place, and mostly directly.
    weights = dict(WEIGHTS)
    for name, tensor in WEIGHTS.items():
        if name.startswith("decoder.") and tensor.shape[2:] == (3, 3):
            weights[name] = torch.zeros_like(tensor)
            weights[name][:, :, 1, 1] = tensor[:, :, 1, 1] * (0.3 if "conv2" in name else 3)
    vae = build_vae(detect_vae(specs_of(weights), "tame"), weights, torch.float32)
    state = torch.random.get_rng_state()
    preview = LatentPreview.fit(vae)
    assert torch.equal(torch.random.get_rng_state(), state)
    again = LatentPreview.fit(vae)
    assert torch.equal(preview.weights, again.weights)
    latent = noise(1, 16, 6, 5, seed=9).repeat_interleave(4, 2).repeat_interleave(4, 3) * 2.8
    picture = preview.preview(latent)
    assert (picture.shape, picture.dtype) == ((24, 20, 3), torch.uint8)
    assert torch.equal(picture, preview.preview(latent[0]))
    decoded = vae.decode(latent).movedim(3, 1)
    right = torch.nn.functional.avg_pool2d(decoded, vae.config.ratio)[0].movedim(0, 2)
    error = (picture / 255 - right).square().mean()
    print(f"unexplained: {error / right.var():.2f}")
    assert error < 0.5 * right.var()
    assert preview.preview(torch.full((16, 2, 2), torch.nan)).shape == (2, 2, 3)
    with pytest.raises(ValueError, match="can be shown"):
        preview.preview(noise(2, 16, 4, 4))
