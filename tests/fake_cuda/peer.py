"""Another process on the same GPU, which a test tells what to do, one driver call at a time.

Run as a program it is that process: JSON lines in, JSON lines out. It shares nothing with the test
but the driver library and the environment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import TracebackType
from typing import Any


class PeerError(Exception):
    """The call failed over there; ``code`` is the CUresult."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class Peer:
    """``with Peer() as peer: peer.call("mem_alloc", 2 << 20)``; ends the process at the end."""

    def __init__(self, **environment: str) -> None:
        path = os.pathsep.join(entry for entry in sys.path if entry)
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            env={**os.environ, "PYTHONPATH": path, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Peer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of ``CudaDriver`` over there, with device 0's context current."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([method, *map(_to_json, arguments)]) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise EOFError(f"the peer ended with {self.process.wait()} in {method}")
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["code"], answer["error"])
        return _from_json(answer["result"])

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.process.kill()
        self.process.communicate()


def _to_json(value: Any) -> Any:
    return {"hex": value.hex()} if isinstance(value, bytes) else value


def _from_json(value: Any) -> Any:
    return bytes.fromhex(value["hex"]) if isinstance(value, dict) else value


def main() -> None:
    from xdit_sidecar.protocol.regions.cuda_driver import CudaDriver, CudaError

    driver = CudaDriver.load()
    for line in sys.stdin:
        method, *arguments = json.loads(line)
        answer: dict[str, Any]
        try:
            with driver.context(0):
                result = getattr(driver, method)(*map(_from_json, arguments))
            answer = {"result": _to_json(result)}
        except CudaError as error:
            answer = {"code": error.code, "error": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
