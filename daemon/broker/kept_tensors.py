"""Which tensors the ranks keep under the digest of their bytes. Pure.

The ranks do as they are told: what is to be forgotten travels with the task that makes room, so
there is one book about it, and this is it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import NamedTuple

from ...protocol import limits
from ...protocol.messages import TensorPart


class KeptKey(NamedTuple):
    """A digest counts for the session that sent the bytes, and for no other."""

    session: str
    digest: bytes


class KeptTensors:
    """Least recently used first to go; bounded in number and bytes over all sessions."""

    def __init__(
        self, *, most: int = limits.KEPT_TENSORS, most_bytes: int = limits.KEPT_BYTES
    ) -> None:
        self._most = most
        self._most_bytes = most_bytes
        self._sizes: OrderedDict[KeptKey, int] = OrderedDict()
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._sizes)

    def missing(self, session: str, parts: Iterable[TensorPart]) -> list[bytes]:
        """The digests that a job names without sending the bytes, and that are not kept."""
        return [
            part.digest
            for part in parts
            if part.digest is not None
            and not part.inline
            and KeptKey(session, part.digest) not in self._sizes
        ]

    def use(self, session: str, parts: Iterable[TensorPart]) -> list[KeptKey]:
        """A job is about to begin: keep what it brings. Returns what has to be forgotten first.

        That may be something that the job itself brings, if it is too much to be kept at all.
        """
        for part in parts:
            if part.digest is None:
                continue
            key = KeptKey(session, part.digest)
            if part.inline:  # bytes that come again take the place of the old ones
                self.nbytes += part.nbytes - self._sizes.get(key, 0)
                self._sizes[key] = part.nbytes
            if key in self._sizes:  # if not, the ranks have just been lost
                self._sizes.move_to_end(key)
        forgotten = []
        while len(self._sizes) > self._most or self.nbytes > self._most_bytes:
            key, nbytes = self._sizes.popitem(last=False)
            self.nbytes -= nbytes
            forgotten.append(key)
        return forgotten

    def end_session(self, session: str) -> None:
        """The session is gone, and with it all that it kept."""
        ended = [key for key in self._sizes if key.session == session]
        for key in ended:
            self.nbytes -= self._sizes.pop(key)

    def clear(self) -> None:
        """The ranks have been restarted."""
        self._sizes.clear()
        self.nbytes = 0
