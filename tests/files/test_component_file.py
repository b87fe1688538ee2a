"""Components that go straight from a file into a region."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import components
import pytest
import torch
from daemon_process import DaemonProcess
from platforms import Platform
from safetensors.torch import save_file
from weights_files import large_file, random_file
from xdit_sidecar.protocol.client.client import Client
from xdit_sidecar.protocol.client.fill import RegionWriter
from xdit_sidecar.protocol.component_file import ComponentFile, hand_over_file
from xdit_sidecar.protocol.errors import BadFile
from xdit_sidecar.protocol.regions.base import RegionMapping
from xdit_sidecar.protocol.regions.memfd import MemfdMapping
from xdit_sidecar.protocol.regions.views import torch_dtype
from xdit_sidecar.protocol.safetensors_file import SafetensorsFile

CHECKPOINT = {
    "first_stage_model.decoder.conv_in.weight": ("F32", [8, 4, 3, 3]),
    "model.diffusion_model.out.bias": ("BF16", [320]),
    "first_stage_model.decoder.conv_in.bias": ("F32", [8]),
    "first_stage_model.nothing": ("F16", [0, 3]),
}


def write(path: Path, shapes: dict[str, tuple[str, list[int]]] = CHECKPOINT) -> dict[str, bytes]:
    content, tensors = random_file(shapes)
    path.write_bytes(content)
    return tensors


def raw(view: torch.Tensor) -> bytes:
    return view.cpu().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_a_file_is_handed_over_and_then_attached(
    daemon: DaemonProcess, platform: Platform, tmp_path: Path
) -> None:
    path = tmp_path / "checkpoint.safetensors"
    sources = write(path)
    with (
        daemon.client("first") as first,
        daemon.client("second") as second,
        SafetensorsFile.open(path) as opened,
        SafetensorsFile.open(path) as again,
    ):
        one, other = (ComponentFile(file, role="checkpoint") for file in (opened, again))
        filled = hand_over_file(first, one, platform.device)
        assert one.bytes_read == sum(map(len, sources.values()))
        attached = hand_over_file(second, other, platform.device)
        assert other.bytes_read == 0
        assert attached.component.label == "checkpoint.safetensors"
        for attachment in (filled, attached):
            found = {name: raw(view) for name, view in attachment.tensors().items()}
            assert found == sources
            attachment.release()


def test_a_prefix_selects_one_component_of_a_checkpoint(
    daemon: DaemonProcess, platform: Platform, tmp_path: Path
) -> None:
    path = tmp_path / "checkpoint.safetensors"
    sources = write(path)
    prefix = "first_stage_model."
    expected = {n.removeprefix(prefix): b for n, b in sources.items() if n.startswith(prefix)}
    with daemon.client() as client, SafetensorsFile.open(path) as opened:
        vae = ComponentFile(opened, role="vae", prefix=prefix)
        whole = ComponentFile(opened, role="vae")
        assert vae.component.fingerprint != whole.component.fingerprint
        with hand_over_file(client, vae, platform.device) as attachment:
            views = attachment.tensors()
            assert {name: raw(view) for name, view in views.items()} == expected
            del views
        assert vae.bytes_read == sum(map(len, expected.values()))


def test_weights_are_converted_where_asked(
    daemon: DaemonProcess, platform: Platform, tmp_path: Path
) -> None:
    path = tmp_path / "vae.safetensors"
    sources = {
        "float": torch.randn(16, 8),
        "brain": torch.randn(4).to(torch.bfloat16),
        "fp8": torch.randn(8).to(torch.float8_e4m3fn),
        "steps": torch.arange(4),
        "none": torch.empty(0, 3),
    }
    save_file(sources, path)
    with daemon.client() as client, SafetensorsFile.open(path) as opened:
        file = ComponentFile(opened, role="vae", dtype="BF16")
        assert file.component.fingerprint != ComponentFile(opened, role="vae").component.fingerprint
        with hand_over_file(client, file, platform.device) as attachment:
            views = attachment.tensors()
            for name, source in sources.items():
                dtype = torch.bfloat16 if name in ("float", "brain", "none") else source.dtype
                assert views[name].dtype == dtype
                assert raw(views[name]) == raw(source.to(dtype))
            del views


def test_single_tensors_are_converted_where_asked(
    daemon: DaemonProcess, platform: Platform, tmp_path: Path
) -> None:
    path = tmp_path / "t5.safetensors"
    sources = {
        "t5.norm": torch.randn(16),
        "t5.scale": torch.randn(1),
        "t5.bias": torch.randn(8).to(torch.float8_e4m3fn),
        "t5.weight": torch.randn(4, 4),
    }
    save_file(sources, path)
    wanted = {"t5.norm": "F16", "t5.bias": "BF16", "t5.weight": "F8_E4M3"}
    with daemon.client() as client, SafetensorsFile.open(path) as opened:
        file = ComponentFile(opened, role="t5", prefix="t5.", dtype=wanted)
        with hand_over_file(client, file, platform.device) as attachment:
            views = attachment.tensors()
            for name, source in sources.items():
                dtype = torch_dtype(wanted.get(name, "F32"))
                assert raw(views[name.removeprefix("t5.")]) == raw(source.to(dtype))
            del views
        found = [
            ComponentFile(opened, role="t5", prefix="t5.", dtype=dtype).component.fingerprint
            for dtype in (wanted, {**wanted, "t5.norm": "BF16"}, {"t5.scale": "F32"}, None)
        ]
        assert found[0] == file.component.fingerprint
        assert len(set(found)) == 3
        assert found[2] == found[3]


def test_a_dtype_that_changes_nothing_is_the_same_component(tmp_path: Path) -> None:
    path = tmp_path / "vae.safetensors"
    write(path)
    prefix = "first_stage_model.decoder."
    with SafetensorsFile.open(path) as opened:
        plain = ComponentFile(opened, role="vae", prefix=prefix)
        same = ComponentFile(opened, role="vae", prefix=prefix, dtype="F32")
        assert plain.component == same.component


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"prefix": "vae."}, "no tensor whose name begins with 'vae.'"),
        ({"prefix": "first_stage_model.nothing"}, "is itself a tensor's name"),
        ({"dtype": "F8_E4M3"}, "choose from F64, F32, F16, BF16"),
        ({"dtype": {"first_stage_model.nothing": "I64"}}, "cannot be converted to I64"),
    ],
)
def test_what_cannot_be_a_component(tmp_path: Path, arguments: dict[str, str], told: str) -> None:
    path = tmp_path / "checkpoint.safetensors"
    write(path)
    with SafetensorsFile.open(path) as opened, pytest.raises(BadFile, match=told):
        ComponentFile(opened, role="vae", **arguments)


def test_a_name_that_is_no_text_becomes_a_label(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"v\xffe.safetensors")
    write(path)
    with SafetensorsFile.open(path) as opened:
        assert ComponentFile(opened, role="vae").component.label == "v?e.safetensors"


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    # The clock of some file systems ticks a few hundred times a second only.
    os.utime(path, ns=(0, 12345))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 4)


@pytest.mark.parametrize("change", [overwrite, truncate])
@pytest.mark.parametrize("before_reading", [True, False])
def test_a_file_that_changes_meanwhile_is_not_committed(
    daemon: DaemonProcess,
    platform: Platform,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path], None],
    before_reading: bool,
) -> None:
    path = tmp_path / "vae.safetensors"
    write(path)
    read_file_parts = RegionWriter.read_file_parts

    def change_and_read(writer: RegionWriter, *arguments: Any) -> None:
        if before_reading:
            change(path)
        read_file_parts(writer, *arguments)
        if not before_reading:
            change(path)

    monkeypatch.setattr(RegionWriter, "read_file_parts", change_and_read)
    with daemon.client() as client, SafetensorsFile.open(path) as opened:
        file = ComponentFile(opened, role="vae")
        with pytest.raises(BadFile, match="changed while it was read"):
            hand_over_file(client, file, platform.device)
        daemon.wait_for_status(lambda status: not status.components)


class PlainMapping(MemfdMapping):
    """Host memory behind the way that device memory is filled."""

    fill_parts = RegionMapping.fill_parts


@pytest.mark.parametrize("kind", [MemfdMapping, PlainMapping])
def test_file_bytes_land_where_they_belong(
    kind: type[MemfdMapping], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xdit_sidecar.protocol.regions.base._STAGE_BYTES", 1000)
    content = os.urandom(5000)
    source, region = os.memfd_create("source"), os.memfd_create("region")
    os.write(source, content)
    os.ftruncate(region, 8192)
    mapping = kind(region, 8192, writable=True)
    mapping.read_file(source, 100, 8, 4096)
    mapping.read_file(source, 0, 0, 0)
    assert mapping.read(0, 8192) == bytes(8) + content[100:4196] + bytes(8192 - 8 - 4096)
    with pytest.raises(EOFError, match=r"ends at byte 5000, 1 bytes too early"):
        mapping.read_file(source, 4000, 0, 1001)
    mapping.close()
    os.close(source)


def test_filling_needs_no_torch(tmp_path: Path) -> None:
    path = tmp_path / "vae.safetensors"
    write(path)
    code = """
import sys
from xdit_sidecar.protocol.component_file import ComponentFile
from xdit_sidecar.protocol.safetensors_file import SafetensorsFile
with SafetensorsFile.open(sys.argv[1]) as file:
    ComponentFile(file, role="vae")
assert not {"torch", "numpy"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)


def test_weights_do_not_pile_up_on_the_way(
    daemon: DaemonProcess, platform: Platform, tmp_path: Path
) -> None:
    path = tmp_path / "large.safetensors"
    nbytes = large_file(path, 96)
    stage = 0 if platform.option == "cpu" else 32 << 20
    with daemon.client() as client, SafetensorsFile.open(path) as opened:
        file = ComponentFile(opened, role="vae")
        tracemalloc.start()
        try:
            hand_over_file(client, file, platform.device).release()
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert file.bytes_read == nbytes
    assert peak < stage + (4 << 20)


def test_attaching_must_not_fill(daemon: DaemonProcess, platform: Platform, tmp_path: Path) -> None:
    path = tmp_path / "vae.safetensors"
    write(path)
    with daemon.client() as client, SafetensorsFile.open(path) as opened:
        file = ComponentFile(opened, role="vae")
        first = hand_over_file(client, file, platform.device)
        file.fill = components.must_not_fill  # type: ignore[method-assign]
        hand_over_file(client, file, platform.device).release()
        first.release()


def test_a_lease_ends_without_waiting_for_the_garbage_collector(
    daemon: DaemonProcess, platform: Platform, tmp_path: Path
) -> None:
    path = tmp_path / "vae.safetensors"
    write(path)

    def use(client: Client) -> None:
        with SafetensorsFile.open(path) as opened:
            file = ComponentFile(opened, role="vae")
            views = hand_over_file(client, file, platform.device).tensors()
            assert views

    with daemon.client() as client:
        gc.disable()
        try:
            use(client)  # asks first, and is refused: the error must not keep this frame
            daemon.wait_for_status(lambda status: not status.components[0].sessions)
        finally:
            gc.enable()
