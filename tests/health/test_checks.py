"""Single checks, where the real thing cannot be had: other hosts, other versions, other states."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
from daemon_process import running_daemon
from xdit_sidecar import __version__
from xdit_sidecar.protocol import messages as m
from xdit_sidecar.protocol.client.client import Client
from xdit_sidecar.protocol.client.deadline import Deadline
from xdit_sidecar.protocol.errors import Cancelled
from xdit_sidecar.protocol.health.check import Check, HealthReport, failed, passed, skipped
from xdit_sidecar.protocol.health.holdings import check_clients, check_ownership, check_ranks
from xdit_sidecar.protocol.health.nodes import look_at_nodes
from xdit_sidecar.protocol.health.reachability import compare_versions
from xdit_sidecar.protocol.health.runner import run_checks
from xdit_sidecar.protocol.health.surroundings import check_namespaces, describe_container
from xdit_sidecar.protocol.health.units import human_age, human_bytes, human_ms
from xdit_sidecar.protocol.manifest import TensorSpec
from xdit_sidecar.protocol.version import PROTOCOL_VERSION

GPU = "GPU-00000000-0000-0000-0000-000000000001"


def test_healthy_means_nothing_failed_and_every_device_proved() -> None:
    good = [Check.of("daemon", passed("x"), 0.1), Check.of("region cpu", passed("x"), 0.1)]
    assert HealthReport.of(good, ["cpu"]).ok
    assert not HealthReport.of(good, ["cpu", GPU]).ok
    assert not HealthReport.of(good, []).ok
    assert not HealthReport.of([*good, Check.of(f"region {GPU}", skipped("x"), 0)], ["cpu", GPU]).ok
    assert not HealthReport.of([*good, Check.of("peer", failed("x", "y"), 0)], ["cpu"]).ok


def test_versions_that_differ_are_a_warning() -> None:
    newer = PROTOCOL_VERSION._replace(minor=PROTOCOL_VERSION.minor + 1)
    assert compare_versions(PROTOCOL_VERSION, __version__).status == "ok"
    assert compare_versions(newer, __version__).status == "warn"
    assert compare_versions(PROTOCOL_VERSION, "0.0.1").status == "warn"


def test_device_nodes(tmp_path: Path) -> None:
    dev, proc = tmp_path / "dev", tmp_path / "proc"
    dev.mkdir()
    assert look_at_nodes([GPU], dev, proc).status == "fail"
    for name in ("nvidiactl", "nvidia-uvm", "nvidia0"):
        (dev / name).touch()
    found = look_at_nodes([GPU], dev, proc)
    assert found.detail == "nvidiactl, nvidia-uvm, nvidia0"
    # The driver's word on which node it is counts where it can be had.
    (proc / "gpus/0000:01:00.0").mkdir(parents=True)
    information = proc / "gpus/0000:01:00.0/information"
    information.write_text(f"GPU UUID: \t {GPU}\nDevice Minor: \t 3\n")
    found = look_at_nodes([GPU], dev, proc)
    assert found.status == "fail"
    assert "nvidia3 does not exist" in found.detail
    (dev / "nvidia3").touch()
    assert look_at_nodes([GPU], dev, proc).status == "ok"
    (dev / "nvidiactl").unlink()
    assert look_at_nodes([GPU], dev, proc).status == "fail"


def test_containers_are_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("container", raising=False)
    assert describe_container(tmp_path) is None
    (tmp_path / "proc/1").mkdir(parents=True)
    cgroup = tmp_path / "proc/1/cgroup"
    cgroup.write_text("0::/init.scope\n")
    assert describe_container(tmp_path) is None
    cgroup.write_text("0::/kubepods/burstable/pod1\n")
    assert describe_container(tmp_path) == "a container (kubepods)"
    monkeypatch.setenv("container", "lxc")
    assert describe_container(tmp_path) == "a container (lxc)"
    (tmp_path / ".dockerenv").touch()
    assert describe_container(tmp_path) == "a docker container"
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.containerenv").touch()
    assert describe_container(tmp_path) == "a podman container"


def make_status(**changes: object) -> m.Status:
    device = m.DeviceStatus(device=GPU, name="GPU", kind="cuda_ipc", state="ready")
    status = m.Status(
        daemon=__version__,
        protocol="1.0",
        boot_id="b",
        pid=10,
        uid=0,
        uptime_seconds=1.0,
        devices=[device],
        components=[],
        sessions=[make_session("s1", 20, 20)],
    )
    return msgspec.structs.replace(status, **changes)


def make_session(name: str, told: int, seen: int, **hello: object) -> m.SessionStatus:
    return m.SessionStatus(
        session=name,
        uid=0,
        pid=seen,
        hello=m.Hello(name="client", pid=told, **hello),
        leases=0,
        age_seconds=1.0,
        meaning=["what it means"] if hello else [],
    )


def make_visit(before: m.Status, now: m.Status | None = None) -> SimpleNamespace:
    """What checks of the daemon's state look at."""
    return SimpleNamespace(
        report=before,
        fresh_status=lambda: now or before,
        opened=SimpleNamespace(
            welcome=SimpleNamespace(session="s1"), daemon_peer=SimpleNamespace(pid=10, uid=0)
        ),
        own_session=lambda: before.sessions[0],
        uses_gpu=any(device.kind != "memfd" for device in before.devices),
    )


def test_another_pid_namespace_is_a_warning_where_there_are_gpus() -> None:
    assert check_namespaces(make_visit(make_status())).status == "ok"
    elsewhere = make_status(sessions=[make_session("s1", 1, 4711)])
    found = check_namespaces(make_visit(elsewhere))
    assert found.status == "warn"
    assert "--pid=host" in found.fix
    host_only = [m.DeviceStatus(device="cpu", name="", kind="memfd", state="ready")]
    quiet = msgspec.structs.replace(elsewhere, devices=host_only)
    assert check_namespaces(make_visit(quiet)).status == "ok"


def test_clients_are_described() -> None:
    other = make_session(
        "s2", 30, 30, torch="2.9", allocator="cudaMallocAsync", host="ComfyUI 1", dynamic_vram=True
    )
    found = check_clients(make_visit(make_status(sessions=[make_session("s1", 20, 20), other])))
    for word in ("ComfyUI 1", "2.9", "cudaMallocAsync", "dynamic VRAM", "what it means"):
        assert word in found.detail


def test_ranks_are_told() -> None:
    def found(state: str) -> str:
        rank = m.RankStatus(rank=0, device=GPU, pid=None, state=state, error="x", starts=3)
        return check_ranks(make_visit(make_status(ranks=[rank]))).status

    assert [found(state) for state in ("ready", "starting", "failed")] == ["ok", "warn", "fail"]
    assert check_ranks(make_visit(make_status())).status == "skip"


def test_what_is_stuck_is_told() -> None:
    def with_component(**changes: object) -> m.Status:
        component = m.ComponentStatus(
            role="vae",
            label="vae.safetensors",
            fingerprint="file:" + "0" * 64,
            device=GPU,
            nbytes=2 << 20,
            state="resident",
            uid=0,
            sessions=["s1"],
        )
        return make_status(components=[msgspec.structs.replace(component, **changes)])

    def found(before: m.Status, now: m.Status | None = None) -> str:
        return check_ownership(make_visit(before, now)).status

    assert found(with_component()) == "ok"
    assert found(with_component(sessions=["s9"])) == "warn"
    filling = with_component(state="filling", sessions=[], idle_seconds=5.0)
    assert found(filling) == "ok"
    assert found(with_component(state="filling", sessions=[], idle_seconds=500.0)) == "warn"
    freeing = with_component(state="freeing", sessions=[])
    assert found(with_component(), freeing) == "ok"
    assert found(freeing, freeing) == "warn"


def test_a_fill_tells_how_long_it_takes(tmp_path: Path) -> None:
    component = m.Component(
        fingerprint="file:" + "1" * 64,
        role="vae",
        label="slow",
        tensors=[TensorSpec("weight", "U8", [16])],
    )
    with running_daemon(tmp_path) as daemon, daemon.client() as client:
        with client.open_fill(component, "cpu"):
            (found,) = client.status().components
        assert found.state == "filling"
        assert found.idle_seconds is not None


def test_a_run_can_be_cancelled(tmp_path: Path) -> None:
    with running_daemon(tmp_path) as daemon:
        with pytest.raises(Cancelled):
            run_checks(daemon.runtime_dir, should_cancel=lambda: True)
        with Client(daemon.runtime_dir) as client:
            assert len(client.status().sessions) == 1
            assert client.session(Deadline(1)).welcome.devices == ["cpu"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (2 << 20, "2 MiB"),
        (-(3 << 20), "-3 MiB"),
        (1 << 42, "4 TiB"),
    ],
)
def test_sizes_are_readable(given: int, said: str) -> None:
    assert human_bytes(given) == said


def test_times_are_readable() -> None:
    assert [human_ms(s) for s in (0.0003123, 0.0121, 3.5)] == ["0.31 ms", "12 ms", "3500 ms"]
    assert [human_age(s) for s in (3, 600, 9000, 200000)] == ["3 s", "10 min", "2.5 h", "2.3 d"]
