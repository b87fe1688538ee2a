"""What a job's answer may weigh: looked at before the work, and by all ranks alike."""

from __future__ import annotations

from ...protocol import limits
from ...protocol.errors import TooLarge


def check_frame(name: str, nbytes: int) -> None:
    """Raise TooLarge if an output of so many bytes cannot be sent."""
    if nbytes > limits.BULK_FRAME:
        raise TooLarge(
            f"the {name} of this job has {nbytes} bytes, the most that can be sent at once is "
            f"{limits.BULK_FRAME}: use a smaller batch or picture"
        )
