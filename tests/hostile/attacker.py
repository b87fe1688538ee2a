"""The attacker: a process of its own. ``attacker.py NAME RUNTIME_DIR COUNT SEED``."""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from xdit_sidecar.protocol.endpoints import resolve_runtime_dir

from hostile.attack import Target
from hostile.catalogue import ATTACKS


def main() -> None:
    name, directory, count, seed = sys.argv[1:]
    target = Target(resolve_runtime_dir(directory), random.Random(int(seed)))
    began = time.monotonic()
    inputs = ATTACKS[name].run(target, int(count))
    report = {
        "inputs": inputs,
        "seconds": time.monotonic() - began,
        "secrets": [secret.hex() for secret in target.secrets],
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
