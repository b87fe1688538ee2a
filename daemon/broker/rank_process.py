"""The broker's end of a process that is a rank, or waits to become one."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence

from ...protocol import codec, limits
from ...protocol.errors import SidecarError
from ...protocol.frames import FrameStream, StreamClosed
from ..ranks.messages import Assignment, Imported, RankWord, Refused
from .child_process import ChildProcess


class RankProcess:
    """It imports what a rank needs, then waits until it is told which rank it is.

    ``on_imported()`` is called once; ``on_exit(status)`` is, too, after it is reaped.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        on_imported: Callable[[], None],
        on_exit: Callable[[int], None],
    ) -> None:
        """Raises OSError if the process cannot be started."""
        self.imported = False
        self.error: str | None = None  # its last words
        self.on_imported = on_imported
        self.on_exit = on_exit
        self._loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        self._stream = FrameStream(ours)
        try:
            with theirs:
                self._child = ChildProcess(
                    "xdit_sidecar.daemon.ranks",
                    ["--channel", str(theirs.fileno()), *arguments],
                    on_exit=self._exited,
                    descriptors=[theirs.fileno()],
                )
        except OSError:
            self._stream.close()
            raise
        self.pid = self._child.pid
        self._loop.add_reader(self._stream, self._readable)

    def assign(self, assignment: Assignment) -> None:
        """Tell it which rank it is. Raises StreamClosed if it has ended."""
        self._stream.queue_frame(codec.encode(assignment))
        self._stream.flush()  # some hundred bytes, which an empty socket always takes

    def kill(self) -> None:
        """End the process; ``on_exit`` follows."""
        self._child.kill()

    def discard(self) -> None:
        """End the process now; ``on_exit`` is not called."""
        self._hang_up()
        self._child.discard()

    def _readable(self) -> None:
        try:
            self._stream.read_available()
            while (frame := self._stream.take_frame()) is not None:
                match codec.decode(frame, RankWord, limit=limits.STREAM_FRAME):
                    case Imported():
                        self.imported = True
                        self.on_imported()
                    case Refused(reason):
                        self.error = reason
        except StreamClosed:
            self._loop.remove_reader(self._stream)  # it is about to end
        except SidecarError as error:
            self.error = f"it spoke nonsense: {error}"
            self.kill()

    def _hang_up(self) -> None:
        self._loop.remove_reader(self._stream)
        self._stream.close()

    def _exited(self, status: int) -> None:
        self._readable()  # its last words may still be there
        self._hang_up()
        self.on_exit(status)
