"""What the commands' exit statuses mean."""

from __future__ import annotations

from ...protocol.endpoints import RuntimeDirError
from ...protocol.errors import DaemonAbsent, SidecarError
from ..comfyui.folder import NotComfyUI

HEALTHY = 0
FAILED = 1
USAGE = 2
NO_DAEMON = 3


def of_error(error: SidecarError) -> int:
    """The status of a command that ends with this error."""
    match error:
        case DaemonAbsent():
            return NO_DAEMON
        case RuntimeDirError() | NotComfyUI():
            return USAGE
    return FAILED
