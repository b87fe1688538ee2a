"""The health-check on a real GPU, with a rank: its JSON as users get it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent / "tests")]

from daemon_process import running_daemon  # noqa: E402
from figures import Figure  # noqa: E402
from machine import describe_run  # noqa: E402


def main() -> int:
    """Write ``gpu-health.json`` into the directory given; the health-check's own exit status."""
    with (
        tempfile.TemporaryDirectory(dir="/tmp") as directory,
        running_daemon(Path(directory), "--ranks", "1", device="cuda") as daemon,
    ):
        answer = subprocess.run(
            [
                *(sys.executable, "-m", "xdit_sidecar.daemon", "ipc", "health-check"),
                *("--json", "--wait", "ready", "--timeout", "60"),
                *("--runtime-dir", str(daemon.runtime_dir)),
            ],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"},
        )
        runtime_dir = str(daemon.runtime_dir)
    print(answer.stdout, answer.stderr, flush=True)
    report = json.loads(answer.stdout.replace(runtime_dir, "RUNTIME_DIR"))
    result = {
        **describe_run(),
        "figures": [Figure("exit status", answer.returncode, "", 0).as_dict()],
        "report": report,
    }
    (Path(sys.argv[1]) / "gpu-health.json").write_text(json.dumps(result, indent=2) + "\n")
    return answer.returncode


if __name__ == "__main__":
    sys.exit(main())
