"""Which tensors the ranks keep for this session, so that they are not sent again."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from typing import TYPE_CHECKING

from ..tensors import digest_tensor

if TYPE_CHECKING:
    import torch

    from .session import ClientSession

_MOST = 16  # tensors remembered; a sampler turns to the same few again and again


class SentTensors:
    """Digests of what was sent, and the tensors themselves to recognise them by.

    A sampler builds its conditioning anew for every step. Comparing it where it lies costs far less
    than fetching it from a device and hashing it.
    """

    def __init__(self) -> None:
        self._session: weakref.ref[ClientSession] | None = None
        self._known: OrderedDict[bytes, torch.Tensor] = OrderedDict()
        self._sent: set[bytes] = set()

    def enter(self, session: ClientSession) -> None:
        """Another session knows nothing of what was sent before."""
        if self._session is None or self._session() is not session:
            self._session = weakref.ref(session)
            self._sent.clear()

    def name(self, tensor: torch.Tensor) -> bytes:
        """The digest of a tensor."""
        for digest, known in reversed(self._known.items()):
            if _same(known, tensor):
                self._known.move_to_end(digest)
                return digest
        digest = digest_tensor(tensor)
        self._known[digest] = tensor.detach().clone()
        if len(self._known) > _MOST:
            oldest, _ = self._known.popitem(last=False)
            self._sent.discard(oldest)
        return digest

    def was_sent(self, digest: bytes) -> bool:
        """Whether the ranks should have it."""
        return digest in self._sent

    def sent(self, digest: bytes) -> None:
        """The ranks have it now."""
        self._sent.add(digest)

    def lost(self, digests: list[bytes]) -> None:
        """The ranks do not have these any more."""
        self._sent.difference_update(digests)


def _same(known: torch.Tensor, tensor: torch.Tensor) -> bool:
    import torch

    if known.shape != tensor.shape or known.dtype != tensor.dtype:
        return False
    return known.device == tensor.device and torch.equal(known, tensor)
