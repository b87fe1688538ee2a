"""What XDiT Status shows of what ComfyUI cannot make happen on a CPU."""

from __future__ import annotations

from xdit_sidecar.comfy_client_node.status_text import describe
from xdit_sidecar.protocol import messages as m

GPU = "GPU-00000000-0000-0000-0000-000000000000"


def test_copies_of_text_encoders_in_host_memory_are_told() -> None:
    status = m.Status(
        **{"daemon": "0", "protocol": "1.0", "boot_id": "b", "pid": 1, "uid": 0},
        uptime_seconds=1.0,
        devices=[],
        components=[],
        sessions=[],
        ranks=[
            m.RankStatus(rank=n, device=GPU, pid=2 + n, state="ready", copied=n << 30)
            for n in (0, 1)
        ],
        group=m.GroupStatus(
            state="ready",
            backend="nccl",
            deadline_seconds=60.0,
            jobs=0,
            kept_tensors=0,
            kept_bytes=0,
        ),
    )
    assert describe(status).splitlines() == [
        "xdit-sidecar 0, pid 1",
        "2 ranks, ready, 0 jobs",
        f"rank 1: 1 GiB copied to {GPU}, of components in host memory",
    ]
