"""What a job's answer may weigh: looked at before the work, and by all ranks alike."""

from __future__ import annotations

from ...protocol import limits
from ...protocol.errors import TooLarge


def check_output(name: str, nbytes: int) -> None:
    """Raise TooLarge if an output of so many bytes cannot be sent."""
    if nbytes > limits.JOB_OUTPUT:
        raise TooLarge(
            f"the {name} of this job has {nbytes} bytes, the most that can be sent at once is "
            f"{limits.JOB_OUTPUT}: use a smaller batch or picture"
        )
