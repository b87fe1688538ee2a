"""What `xdit-sidecar status` says below its tables, of what only GPUs can bring about."""

from __future__ import annotations

from xdit_sidecar.daemon.commands.status import describe_status
from xdit_sidecar.protocol import messages as m

GPU = "GPU-00000000-0000-0000-0000-000000000000"


def rank(number: int, **told: object) -> m.RankStatus:
    return m.RankStatus(rank=number, device=GPU, pid=2, state="ready", **told)  # type: ignore[arg-type]


def test_how_ranks_exchange_and_compute() -> None:
    flux = {"label": "FLUX.1 dev", "compute": "BF16", "state": "compiled"}
    transformers = [
        m.TransformerStatus(**flux, recorded=2),  # type: ignore[arg-type]
        m.TransformerStatus(**flux, lora=True, not_recorded="no graph"),  # type: ignore[arg-type]
    ]
    status = m.Status(
        **{"daemon": "0", "protocol": "1.2", "boot_id": "b", "pid": 1, "uid": 0},
        uptime_seconds=1.0,
        devices=[],
        components=[],
        sessions=[],
        ranks=[rank(0, transformers=transformers), rank(1)],
        group=m.GroupStatus(
            state="ready",
            backend="nccl",
            by_nccl="no room",
            deadline_seconds=60.0,
            jobs=0,
            kept_tensors=0,
            kept_bytes=0,
        ),
    )
    lines = [part for part in describe_status(status) if isinstance(part, str)]
    assert lines[-3:] == [
        "rank 0: FLUX.1 dev, BF16: compiled, 2 recorded",
        "rank 0: FLUX.1 dev, BF16, with LoRA: compiled, not recorded (no graph)",
        "ranks exchange by NCCL, not by copy engines: no room",
    ]
