"""Keys and values that PipeFusion keeps between steps, per session and condition, bounded."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Signature:
    """What must not change from one step to the next if old keys and values are to be of use."""

    shapes: tuple[tuple[int, ...], ...]  # of the image and text tokens, for the whole batch
    dtype: str
    patches: int
    condition: str  # what names the prompt, e.g. the hash of its bytes
    adapters: str  # what names the LoRA stack; "" for none


@dataclass
class KvEntry:
    """One denoising run's keys and values: of each of this stage's layers, over all tokens."""

    signature: Signature
    nbytes: int  # on the stage that holds most, so that all stages count alike
    sigma: float = float("inf")  # of the last step
    warm_steps: int = 0  # since the entry was made
    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # by block


class KvStore:
    """Entries by (session, slot), least recently used first to go.

    A ``slot`` tells apart what one session denoises in turns, as cond and uncond. All ranks see
    the same requests in the same order and count the same bytes, so they forget the same entries
    without a word between them; what is forgotten costs a warm step and nothing else.
    """

    def __init__(self, *, max_entries: int, max_bytes: int) -> None:
        """``max_bytes`` counts a rank's device memory."""
        self._entries: OrderedDict[tuple[str, str], KvEntry] = OrderedDict()
        self._max_entries = max_entries
        self._max_bytes = max_bytes

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes on the stage that holds most."""
        return sum(entry.nbytes for entry in self._entries.values())

    def find(self, session: str, slot: str) -> KvEntry | None:
        """The entry, now the most recently used one."""
        entry = self._entries.get((session, slot))
        if entry is not None:
            self._entries.move_to_end((session, slot))
        return entry

    def fits(self, entry: KvEntry) -> bool:
        """False if the entry alone is larger than the bound: then nothing need be kept for it."""
        return entry.nbytes <= self._max_bytes and self._max_entries > 0

    def put(self, session: str, slot: str, entry: KvEntry) -> bool:
        """Keep an entry, forgetting others; False if it alone is larger than the bound."""
        self.forget(session, slot)
        if not self.fits(entry):
            return False
        while self._entries and (
            len(self._entries) >= self._max_entries or self.nbytes + entry.nbytes > self._max_bytes
        ):
            self._entries.popitem(last=False)
        self._entries[session, slot] = entry
        return True

    def forget(self, session: str, slot: str | None = None) -> None:
        """Drop one entry, or all of a session that has ended."""
        for key in [k for k in self._entries if k[0] == session and slot in (None, k[1])]:
            del self._entries[key]

    def forget_others(self, sessions: Container[str]) -> None:
        """Drop the entries of all sessions but these."""
        for key in [key for key in self._entries if key[0] not in sessions]:
            del self._entries[key]
