"""Records what a client of this version sends, byte for byte. Run it as a program.

A transcript is written once per minor version and then kept: `test_transcript.py` replays it for
ever. What belongs to one session only (its token, regions and leases) is recorded as placeholders
of the same length, which the player replaces.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from xdit_sidecar.protocol import codec
from xdit_sidecar.protocol import messages as m
from xdit_sidecar.protocol.manifest import TensorSpec
from xdit_sidecar.protocol.version import PROTOCOL_VERSION, encode_preamble

TRANSCRIPTS = Path(__file__).parent / "transcripts"
TOKEN = b"{the token of this session here}"
REGION, LEASE = "c0ffee" * 5 + "01", "c0ffee" * 5 + "02"
SCRATCH = 1 << 20  # bytes
FINGERPRINT = "bytes:" + "5a" * 32


def record() -> dict[str, object]:
    """The stream's bytes, and each request's name, bytes and expected answer."""
    assert len(TOKEN) == 32
    hello = codec.encode(
        m.Hello(
            name="transcript",
            pid=1,
            python="3.11.9",
            torch="2.7.1",
            cuda="12.8",
            allocator="cudaMallocAsync",
            dynamic_vram=False,
            host="ComfyUI 0.3.75",
            pid_namespace=1,
        )
    )
    component = m.Component(
        fingerprint=FINGERPRINT,
        role="vae",
        label="transcript.safetensors",
        tensors=[
            TensorSpec("decoder.weight", "BF16", [4, 3, 2, 2], 0, [12, 1, 6, 3]),
            TensorSpec("decoder.bias", "F32", [4], 512),
        ],
    )
    asked: list[tuple[str, m.RequestBody, str, list[str]]] = [
        ("ping", m.Ping(), "pong", ["boot_id"]),
        ("attach-nothing", m.Attach(device="cpu", fingerprint=FINGERPRINT), "failed", FAILED),
        ("hand-over", m.HandOver(device="cpu", component=component), "fill", ["grant"]),
        ("commit", m.Commit(REGION), "attached", ATTACHED),
        ("status", m.GetStatus(), "status-report", STATUS),
        ("evict-leased", m.Evict(device="cpu", fingerprint=FINGERPRINT), "failed", FAILED),
        ("release", m.Release(LEASE), "done", []),
        ("attach", m.Attach(device="cpu", fingerprint=FINGERPRINT), "attached", ATTACHED),
        ("release-again", m.Release(LEASE), "done", []),
        ("evict", m.Evict(device="cpu", fingerprint=FINGERPRINT), "done", []),
        ("cancel", m.CancelRequest(999), "done", []),
        ("scratch", m.OpenScratch(number=1, nbytes=SCRATCH), "scratch-opened", ["descriptor"]),
    ]
    return {
        "protocol": str(PROTOCOL_VERSION),
        "token": TOKEN.hex(),
        "region": REGION,
        "lease": LEASE,
        "stream": (encode_preamble() + len(hello).to_bytes(4, "big") + hello).hex(),
        "requests": [
            {
                "name": name,
                "bytes": codec.encode(m.Request(TOKEN, number, body)).hex(),
                "answer": answer,
                "keys": keys,
            }
            for number, (name, body, answer, keys) in enumerate(asked, 1)
        ],
    }


FAILED = ["code", "message"]
ATTACHED = ["lease", "grant", "component"]
STATUS = ["boot_id", "components", "daemon", "devices", "pid", "protocol", "sessions", "uid"]


if __name__ == "__main__":
    path = TRANSCRIPTS / f"client-{PROTOCOL_VERSION}.json"
    if path.exists():
        sys.exit(f"{path} exists: what an old client sent does not change")
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record(), indent=1) + "\n")
    print(f"wrote {path}")
