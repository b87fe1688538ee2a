"""A process with a lease and an open fill, and what they are called: ``victim.py RUNTIME_DIR``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from xdit_sidecar.protocol import messages as m
from xdit_sidecar.protocol.client.client import Client
from xdit_sidecar.protocol.client.deadline import Deadline
from xdit_sidecar.protocol.manifest import TensorSpec

CONTENT = bytes(range(256)) * 4


def small_component(number: int) -> m.Component:
    """A component of 1 KiB."""
    tensors = [TensorSpec("weight", "U8", [len(CONTENT)], 0, None)]
    return m.Component(
        fingerprint=f"bytes:{number:064x}", role="vae", label="victim", tensors=tensors
    )


def main() -> None:
    """Hold a lease and an open fill until standard input ends, then look whether they are well."""
    with Client(Path(sys.argv[1]), name="victim") as client:
        deadline = Deadline(20)
        session = client.session(deadline)
        attached = client.hand_over(small_component(1), "cpu", lambda w: w.write(0, CONTENT))
        attach = m.Attach(device="cpu", fingerprint=small_component(1).fingerprint)
        lease = client.exchanges.ask(session, attach, m.Attached, deadline)
        with client.open_fill(small_component(2), "cpu") as fill:
            assert fill.writer is not None
            fill.writer.write(0, CONTENT)
            stolen = {
                "token": session.welcome.token.hex(),
                "region": fill._grant.region,
                "resident": attached.region,
                "lease": lease.lease,
            }
            print(json.dumps(stolen), flush=True)
            sys.stdin.readline()
            assert fill.probe("keeper", length=256) == CONTENT[:256]
            assert attached.mapping.read(0, len(CONTENT)) == CONTENT
            client.exchanges.ask(session, m.Release(lease.lease), m.Done, Deadline(20))
            print("intact", flush=True)
        attached.release()


if __name__ == "__main__":
    main()
