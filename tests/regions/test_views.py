"""Tensors are views: their bytes are the region's, their shapes and strides the source's."""

from __future__ import annotations

import os

import components
import pytest
import torch
from xdit_sidecar.protocol.errors import BadMessage, RegionUnavailable, StillMapped
from xdit_sidecar.protocol.manifest import TensorSpec, lay_out, region_bytes
from xdit_sidecar.protocol.regions.base import MappingBytes
from xdit_sidecar.protocol.regions.memfd import MemfdMapping, MemfdOwner
from xdit_sidecar.protocol.regions.views import (
    copy_into,
    describe_tensors,
    safetensors_dtype,
    torch_dtype,
    view_tensors,
)

REGION = "a" * 32


@pytest.fixture
def owner():
    made = MemfdOwner()
    yield made
    made.close()


def open_region(owner: MemfdOwner, nbytes: int, *, writable: bool) -> MemfdMapping:
    descriptor = owner.export(REGION).descriptor
    assert descriptor is not None
    return MemfdMapping(descriptor, nbytes, writable=writable)


def test_views_have_the_bytes_shapes_and_strides_of_their_sources(owner: MemfdOwner) -> None:
    sources = components.random_tensors()
    specs = describe_tensors(sources)
    nbytes = region_bytes(specs)
    owner.allocate(REGION, nbytes)
    mapping = open_region(owner, nbytes, writable=True)
    region = MappingBytes(mapping)
    counted: list[int] = []
    copy_into(region, specs, sources, counted.append)
    assert sum(counted) == sum(spec.nbytes for spec in specs)
    views = view_tensors(region, specs)
    for name, source in sources.items():
        assert torch.equal(views[name], source)
        assert views[name].stride() == source.stride()
        assert views[name].dtype == source.dtype
        assert not views[name].requires_grad
    assert views["tied"].data_ptr() == views["block.0.weight"].data_ptr()
    assert not views["conv.weight"].is_contiguous()
    # A write through one view is a write to the region.
    views["scale"].fill_(7)
    spec = next(spec for spec in specs if spec.name == "scale")
    assert owner.read(REGION, spec.offset, 4) == torch.tensor(7.0).numpy().tobytes()
    del views, region
    mapping.close()


def test_sources_that_are_not_the_bytes_of_their_views(owner: MemfdOwner) -> None:
    class Doubled(torch.Tensor):
        """As quantised tensors are: the data is not at its address."""

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if func is torch.Tensor.data_ptr:
                raise AssertionError("its memory is not its content")
            return super().__torch_function__(func, types, args, kwargs)

    plain = torch.arange(12.0).reshape(3, 4)
    sources = {
        "transposed": torch.arange(12.0).reshape(4, 3).t(),
        "every other": torch.arange(24.0).reshape(3, 8)[:, ::2],
        "expanded": torch.arange(4.0).expand(3, 4),
        "negated": torch.complex(plain, plain).conj().imag,
        "subclass": plain.clone().as_subclass(Doubled),
        "parameter": torch.nn.Parameter(plain.clone()),
        "one row": torch.arange(100.0).as_strided((1, 4), (77, 1)),
        "mine": torch.arange(12.0).reshape(3, 4),
    }
    specs = lay_out(
        [TensorSpec(name, "F32", list(source.shape)) for name, source in sources.items()]
    )
    owner.allocate(REGION, 2**21)
    mapping = open_region(owner, 2**21, writable=True)
    region = MappingBytes(mapping)
    copy_into(region, specs, sources)
    for name, view in view_tensors(region, specs).items():
        assert torch.equal(view, sources[name]), name
        del view
    del region
    mapping.close()


def test_a_region_is_sealed_only_without_writable_maps(owner: MemfdOwner) -> None:
    owner.allocate(REGION, 2**21)
    mapping = open_region(owner, 2**21, writable=True)
    mapping.write(5, b"bytes")
    with pytest.raises(StillMapped, match="drop every tensor"):
        owner.seal(REGION)
    mapping.close()
    owner.seal(REGION)
    sealed = open_region(owner, 2**21, writable=False)
    assert sealed.read(5, 5) == b"bytes"
    with pytest.raises(RegionUnavailable, match="sealed"):
        sealed.write(5, b"other")
    with pytest.raises(PermissionError):
        owner.write(REGION, 5, b"other")
    with pytest.raises(RegionUnavailable, match="mapping a region"):
        open_region(owner, 2**21, writable=True)
    sealed.close()


def test_a_region_shorter_than_promised_is_not_mapped() -> None:
    descriptor = os.memfd_create("short")
    os.ftruncate(descriptor, 4096)
    with pytest.raises(RegionUnavailable, match="shorter"):
        MemfdMapping(descriptor, 2**21, writable=False)


def test_a_tensor_beyond_its_region_is_refused(owner: MemfdOwner) -> None:
    owner.allocate(REGION, 2**21)
    mapping = open_region(owner, 2**21, writable=True)
    with pytest.raises(BadMessage, match="ends beyond its region"):
        view_tensors(MappingBytes(mapping), [TensorSpec("w", "F32", [2**20], 0)])
    mapping.close()


def test_a_source_of_another_shape_is_refused(owner: MemfdOwner) -> None:
    owner.allocate(REGION, 2**21)
    mapping = open_region(owner, 2**21, writable=True)
    specs = [TensorSpec("v", "F32", [1], 512), TensorSpec("w", "F32", [2, 3], 0)]
    with pytest.raises(BadMessage, match="its manifest says"):
        copy_into(MappingBytes(mapping), specs, {"v": torch.ones(1), "w": torch.zeros(3, 2)})
    assert mapping.read(512, 4) == bytes(4), "nothing was copied"
    mapping.close()


def test_dtypes_go_both_ways() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.int64):
        assert torch_dtype(safetensors_dtype(dtype)) == dtype
    with pytest.raises(BadMessage, match="cannot be shared"):
        safetensors_dtype(torch.complex64)
    with pytest.raises(BadMessage, match="has no dtype"):
        torch_dtype("F4")


@pytest.mark.parametrize("nbytes", [2**20, 2**22])
def test_nobody_changes_the_size_of_a_region_before_commit(owner: MemfdOwner, nbytes: int) -> None:
    owner.allocate(REGION, 2**21)
    descriptor = owner.export(REGION).descriptor
    assert descriptor is not None
    try:
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, nbytes)
    finally:
        os.close(descriptor)
