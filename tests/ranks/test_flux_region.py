"""From a file through a sealed region to a model, as a rank does it."""

from __future__ import annotations

from pathlib import Path

import flux_files
import pytest
import torch
from flux_files import PREFIX, Flux
from flux_inputs import comfy_inputs, run_diffusers
from xdit_sidecar.daemon.models.flux_detection import detect_flux, detect_flux_file
from xdit_sidecar.daemon.ranks.flux.model import build_flux
from xdit_sidecar.protocol.client.fill import RegionWriter
from xdit_sidecar.protocol.component_file import ComponentFile
from xdit_sidecar.protocol.manifest import region_bytes
from xdit_sidecar.protocol.regions.base import MappingBytes
from xdit_sidecar.protocol.regions.memfd import MemfdMapping, MemfdOwner
from xdit_sidecar.protocol.regions.views import view_tensors
from xdit_sidecar.protocol.safetensors_file import SafetensorsFile

REGION = "f" * 32


@pytest.mark.parametrize("scales", [None, "scaled_fp8", "weight_scale"])
def test_a_model_over_a_sealed_region(tmp_path: Path, scales: str | None) -> None:
    weights = flux_files.random_weights(Flux())
    stored = (
        flux_files.store(weights, "F8_E4M3", scales=scales, small="BF16") if scales else weights
    )
    path = tmp_path / "checkpoint.safetensors"
    flux_files.write(path, stored, PREFIX)
    owner = MemfdOwner()
    with SafetensorsFile.open(path) as file:
        config = detect_flux_file(file)
        source = ComponentFile(file, role="transformer", prefix=config.prefix)
        manifest = source.component.tensors
        nbytes = region_bytes(manifest)
        owner.allocate(REGION, nbytes)
        filled = MemfdMapping(owner.export(REGION).descriptor or -1, nbytes, writable=True)
        source.fill(RegionWriter(source.component, MappingBytes(filled)))
        filled.close()
    owner.seal(REGION)
    mapping = MemfdMapping(owner.export(REGION).descriptor or -1, nbytes, writable=False)
    owner.close()
    views = view_tensors(MappingBytes(mapping), manifest)
    # A rank has the manifest, not the file: it must see the same model.
    assert detect_flux(manifest, "region").hidden_size == config.hidden_size
    loaded = build_flux(detect_flux(manifest, "region"), views, torch.float32)
    own = {"norm_out.linear.weight", "norm_out.linear.bias"}
    for name, tensor in (*loaded.model.named_parameters(), *loaded.model.named_buffers()):
        inside = mapping.address <= tensor.data_ptr() < mapping.address + nbytes
        assert inside == (name not in own), name
    # Writing to a sealed region would kill this process.
    inputs = comfy_inputs(Flux())
    output = run_diffusers(loaded.model, inputs)
    apart = build_flux(config, stored, torch.float32)
    torch.testing.assert_close(output, run_diffusers(apart.model, inputs), rtol=0, atol=2e-6)
    del loaded, views, tensor
    mapping.close()
