"""A daemon's report is judged once: who shows it says the same."""

from __future__ import annotations

import pytest
from xdit_sidecar.comfy_client_node.panel_report import make_report
from xdit_sidecar.daemon.service import describe
from xdit_sidecar.protocol import messages as m
from xdit_sidecar.protocol.health.verdict import Failure, find_failures, judge


def report(device: str, group: str | None) -> m.Status:
    """Of a daemon with a device and perhaps two ranks in these states."""
    is_degraded = group == "degraded"
    rank_state = "failed" if is_degraded else group
    return m.Status(
        **{"daemon": "0", "protocol": "1.0", "boot_id": "b", "pid": 1, "uid": 0},
        uptime_seconds=1.0,
        devices=[
            m.DeviceStatus(
                device="cpu",
                name="host memory",
                kind="memfd",
                state=device,
                error="no memory" if device == "failed" else None,
            )
        ],
        components=[],
        sessions=[],
        ranks=[m.RankStatus(rank=n, device="cpu", pid=2 + n, state=rank_state) for n in (0, 1)]
        if group
        else [],
        group=None
        if group is None
        else m.GroupStatus(
            state=group,
            error="no xfuser" if is_degraded else None,
            backend="gloo",
            deadline_seconds=60.0,
            jobs=0,
            kept_tensors=0,
            kept_bytes=0,
        ),
    )


DEVICE = Failure("device", "cpu", "no memory")
RANKS = Failure("ranks", "cpu", "no xfuser")


@pytest.mark.parametrize(
    ("device", "group", "health", "failures"),
    [
        ("ready", None, "ready", []),
        ("ready", "ready", "ready", []),
        ("starting", None, "starting", []),
        ("starting", "ready", "starting", []),
        ("ready", "starting", "starting", []),
        ("failed", None, "degraded", [DEVICE]),
        ("failed", "starting", "degraded", [DEVICE]),
        ("starting", "degraded", "degraded", [RANKS]),
        ("failed", "degraded", "degraded", [DEVICE, RANKS]),
    ],
)
def test_all_say_the_same(
    device: str, group: str | None, health: str, failures: list[Failure]
) -> None:
    status = report(device, group)
    assert judge(status) == health
    assert find_failures(status) == failures
    line = describe(status)
    words = {"device": "cpu failed: no memory", "ranks": "ranks given up: no xfuser"}
    assert [of for of, text in words.items() if text in line] == [f.of for f in failures]
    shown = make_report(status, own_session="")
    assert shown.health == health
    codes = {"device": "device-failed", "ranks": "ranks-degraded"}
    assert [each.code for each in shown.problems] == [codes[f.of] for f in failures]
