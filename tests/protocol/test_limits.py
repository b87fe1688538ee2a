"""The limits fit each other: the largest legal message fits into the frame that carries it."""

from __future__ import annotations

import tracemalloc

from xdit_sidecar.protocol import codec, limits
from xdit_sidecar.protocol import messages as m
from xdit_sidecar.protocol.manifest import TensorSpec

WIDE = "\U0001f9ea"  # four bytes in UTF-8
NUMBER = 2**53
GPU = "GPU-" + "0" * 36


def largest_table() -> list[TensorSpec]:
    extents = [limits.REGION] * limits.DIMENSIONS
    return [
        TensorSpec(f"{i:04}".ljust(limits.NAME, "x"), "F8_E4M3", extents, limits.REGION, extents)
        for i in range(limits.TENSORS)
    ]


def largest_component() -> m.Component:
    return m.Component(
        fingerprint="nonce:" + "0" * 64,
        role="r" * 32,
        label=WIDE * limits.NAME,
        tensors=largest_table(),
    )


def test_the_largest_manifest_fits_in_both_directions() -> None:
    component = largest_component()
    asked = m.Request(b"t" * 32, NUMBER, m.HandOver(device=GPU, component=component))
    grant = m.RegionGrant(
        region="f" * 32,
        kind="cuda_ipc",
        device=GPU,
        nbytes=limits.REGION,
        handle=b"h" * 64,
        descriptor=NUMBER,
    )
    answered = m.Answer(NUMBER, m.Attached(lease="f" * 32, grant=grant, component=component))
    for message, kind in ((asked, m.Request), (answered, m.Answer)):
        data = codec.encode(message)
        assert len(data) <= limits.CONTROL_FRAME
        assert codec.decode(data, kind, limit=limits.CONTROL_FRAME) == message


def test_the_largest_status_fits() -> None:
    name, text = WIDE * limits.NAME, WIDE * limits.TEXT
    # The daemon names sessions itself, s1, s2 …: a billion of them have ten characters.
    sessions = [f"s{10**9 + i}" for i in range(limits.SESSIONS)]
    hello = m.Hello(
        name=name,
        pid=NUMBER,
        python=name,
        torch=name,
        cuda=name,
        allocator=name,
        dynamic_vram=True,
        host=name,
        pid_namespace=NUMBER,
    )
    status = m.Status(
        daemon="9" * 32,
        protocol="65535.65535",
        boot_id="f" * 16,
        pid=NUMBER,
        uid=NUMBER,
        uptime_seconds=1e300,
        devices=[
            m.DeviceStatus(
                device=GPU,
                name=name,
                kind="cuda_ipc",
                state="starting",
                error=text,
                keeper_pid=NUMBER,
                keeper_starts=NUMBER,
                total=limits.REGION,
                free=limits.REGION,
                budget=limits.REGION,
                regions=limits.REGION,
                orphaned=limits.REGION,
                context=limits.REGION,
            )
        ]
        * 64,
        components=[
            m.ComponentStatus(
                role="r" * 32,
                label=name,
                fingerprint="nonce:" + "0" * 64,
                device=GPU,
                nbytes=limits.REGION,
                state="allocating",
                uid=NUMBER,
                sessions=sessions,
                idle_seconds=1e300,
            )
        ]
        * limits.COMPONENTS,
        sessions=[
            m.SessionStatus(
                session=session,
                uid=NUMBER,
                pid=NUMBER,
                hello=hello,
                leases=NUMBER,
                age_seconds=1e300,
                meaning=["x" * 160] * 8,
            )
            for session in sessions
        ],
        ranks=[
            m.RankStatus(
                rank=NUMBER,
                device=GPU,
                pid=NUMBER,
                state="starting",
                error=text,
                starts=NUMBER,
                transformers=[
                    m.TransformerStatus(label=name, compute="BF16", state="refused", reason=name)
                ]
                * limits.TRANSFORMERS,
            )
        ]
        * 64,
    )
    data = codec.encode(m.Answer(NUMBER, status))
    assert len(data) <= limits.CONTROL_FRAME
    assert codec.decode(data, m.Answer, limit=limits.CONTROL_FRAME).body == status


def test_the_largest_hello_and_refusal_fit_into_a_stream_frame() -> None:
    name = WIDE * limits.NAME
    hello = m.Hello(name=name, pid=1, python=name, torch=name, cuda=name, allocator=name, host=name)
    welcome = m.Welcome(
        session=name, token=b"t" * 32, boot_id=name, daemon=name, devices=[GPU] * 64
    )
    for message in (hello, welcome, m.Refused(name, WIDE * limits.TEXT)):
        data = codec.encode(message)
        assert len(data) <= limits.STREAM_FRAME < limits.STREAM_BACKLOG
        assert codec.decode(data, m.StreamMessage, limit=limits.STREAM_FRAME) == message


def test_the_catalog_cannot_hold_gigabytes_of_tables() -> None:
    data = codec.encode(largest_component())
    tracemalloc.start()
    try:
        component = codec.decode(data, m.Component, limit=limits.CONTROL_FRAME)
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    per_tensor = taken / len(component.tensors)
    assert per_tensor * limits.CATALOG_TENSORS < 300 * limits.MIB
    assert limits.CATALOG_TENSORS >= 16 * limits.TENSORS


def test_numbers_that_depend_on_each_other() -> None:
    assert limits.UNGREETED_SESSIONS < limits.SESSIONS
    assert limits.BULK_FRAME <= limits.BULK_MESSAGE <= limits.BULK_FRAME * limits.BULK_PARTS
    assert limits.REGION % limits.REGION_GRANULE == 0
    assert limits.REGION_GRANULE % limits.TENSOR_ALIGNMENT == 0
    assert limits.STREAM_FRAME < limits.STREAM_BACKLOG
    assert limits.PROBE < limits.STREAM_FRAME
    # Every session may have a connection per request in flight, as our own client does.
    assert limits.CONNECTIONS >= limits.SESSIONS
    assert limits.CONTROL_FRAME * 64 <= limits.UNREAD_MEMORY
