"""One client process of the cycle test: ``worker.py RUNTIME_DIR DEVICE NUMBER SEED``.

Hands over, attaches, reads, releases, abandons and evicts in random order until its standard input
ends. Prints one line for each cycle; wrong bytes end it with status 3.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import select
import sys
import time
from pathlib import Path

import msgspec
from xdit_sidecar.protocol import messages as m
from xdit_sidecar.protocol.client.client import Client
from xdit_sidecar.protocol.errors import DeadlineExceeded, SidecarError
from xdit_sidecar.protocol.manifest import TensorSpec

WRONG = 3
SHARED = 4  # components that every worker hands over
OWN = 2  # and those of one worker only
TIMEOUT = 60.0


class Known:
    """A component of random bytes that every process can make again."""

    def __init__(self, seed: int) -> None:
        self.content = random.Random(seed).randbytes(200_000 + 1_000 * seed)
        digest = hashlib.sha256(self.content).hexdigest()
        self.component = m.Component(
            fingerprint=f"bytes:{digest}",
            role="vae",
            label=f"cycle-{seed}",
            tensors=[TensorSpec("weight", "U8", [len(self.content)], 0, None)],
        )


class Worker:
    """One client and what it does in a cycle."""

    def __init__(self, runtime_dir: Path, device: str, number: int, seed: int) -> None:
        self._runtime_dir = runtime_dir
        self._device = device
        self._random = random.Random(seed)
        own = range(1_000 + number * OWN, 1_000 + (number + 1) * OWN)
        self._known = [Known(s) for s in (*range(SHARED), *own)]
        self._name = f"worker{number}"
        self.client = Client(runtime_dir, name=self._name)

    def cycle(self) -> str:
        """Do one thing; what it came to."""
        known = self._random.choice(self._known)
        chance = self._random.random()
        try:
            if chance < 0.60:
                return self._hand_over(known)
            if chance < 0.85:
                return self._attach(known)
            if chance < 0.92:
                nonce = f"nonce:{self._random.getrandbits(256):064x}"
                unknown = msgspec.structs.replace(known.component, fingerprint=nonce)
                with self.client.open_fill(unknown, self._device, timeout=TIMEOUT) as fill:
                    assert fill.writer is not None
                    fill.writer.write(0, b"\xff" * 1_000)
                return "abandoned"
            if chance < 0.98:
                self.client.evict(known.component.fingerprint, self._device, timeout=TIMEOUT)
                return "evicted"
            self.client.close()
            self.client = Client(self._runtime_dir, name=self._name)
            return "reopened"
        except DeadlineExceeded:
            raise  # nobody is stopped for that long
        except SidecarError as error:
            return f"refused {error.code}"

    def _hand_over(self, known: Known) -> str:
        filled = False

        def fill(writer) -> None:
            nonlocal filled
            filled = True
            half = len(known.content) // 2
            writer.write(0, known.content[:half])
            time.sleep(self._random.random() * 0.005)
            writer.write(half, known.content[half:])

        with self.client.hand_over(
            known.component, self._device, fill, timeout=TIMEOUT
        ) as attachment:
            self._check(known, attachment)
        return "filled" if filled else "shared"

    def _attach(self, known: Known) -> str:
        fingerprint = known.component.fingerprint
        attachment = self.client.attach(fingerprint, self._device, timeout=TIMEOUT)
        if attachment is None:
            return "absent"
        with attachment:
            self._check(known, attachment)
        return "attached"

    def _check(self, known: Known, attachment) -> None:
        time.sleep(self._random.random() * 0.005)
        if attachment.mapping.read(0, len(known.content)) != known.content:
            print(f"wrong {known.component.label}", flush=True)
            sys.exit(WRONG)


def main() -> None:
    runtime_dir, device, number, seed = sys.argv[1:]
    worker = Worker(Path(runtime_dir), device, int(number), int(seed))
    with contextlib.suppress(BrokenPipeError):
        while not select.select([sys.stdin], [], [], 0)[0]:
            print(worker.cycle(), flush=True)
    worker.client.close()


if __name__ == "__main__":
    main()
