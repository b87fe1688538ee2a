"""From a file or host memory into device memory through pinned host memory, by several threads.

The page cache or memory gives one thread a few GB/s and the device takes 55, so several threads
read, each with a pinned buffer and a stream of its own. A thread waits for its copy before it reads
on: that costs it a tenth of its time, and the others read meanwhile.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence

from .cuda_driver import CudaDriver, CudaError
from .file_parts import Batch, FilePart, OnBytes, Source, plan_batches, total_bytes
from .readers import Read, ReaderRefused, read_in_parallel

# 64 MiB pinned in all, whatever is filled: large enough for full speed, and pinned in little time.
READERS = 8
BUFFER_BYTES = 8 << 20
# Below this, pinning memory takes longer than it saves.
WORTHWHILE_BYTES = 64 << 20

_log = logging.getLogger("xdit_sidecar.regions")


def fill_through_pinned(
    driver: CudaDriver,
    ordinal: int,
    address: int,
    source: Source,
    parts: Sequence[FilePart],
    on_bytes: OnBytes,
) -> list[FilePart]:
    """Bring parts of ``source`` to device memory at ``address``; what could not be for lack of
    pinned memory is returned, after a warning.

    Not ordered after what other streams do to the same memory. Raises CudaError and what ``source``
    raises; nothing is in flight and nothing is pinned any more when this returns or raises.
    """
    if total_bytes(parts) < WORTHWHILE_BYTES:
        return list(parts)
    batches = list(plan_batches(parts, BUFFER_BYTES))
    readers = min(READERS, len(batches))
    unread, refusals = read_in_parallel(
        batches, lambda: _open(driver, ordinal, address, source), readers, on_bytes
    )
    if refusals:
        _log.warning(
            "%d of %d pinned buffers of %d MiB could not be had (%s): %s. Free host memory or "
            "raise the limit of locked memory (ulimit -l)",
            len(refusals),
            readers,
            BUFFER_BYTES >> 20,
            refusals[0],
            "pageable memory is used, which is several times slower" if unread else "it is slower",
        )
    return unread


@contextlib.contextmanager
def _open(driver: CudaDriver, ordinal: int, address: int, source: Source) -> Iterator[Read]:
    """A reader with its buffer and stream, on the calling thread."""
    with driver.context(ordinal), contextlib.ExitStack() as opened:
        try:
            buffer = driver.mem_host_alloc(BUFFER_BYTES)
            opened.callback(_give_back, driver.mem_free_host, buffer)
            stream = driver.stream_create()
            opened.callback(_give_back, driver.stream_destroy, stream)
        except CudaError as error:
            raise ReaderRefused(str(error)) from None
        # Also after an error: the device may still read the buffer.
        opened.callback(_give_back, driver.stream_synchronize, stream)
        stage = driver.view_host(buffer, BUFFER_BYTES)

        def read(batch: Batch) -> None:
            start = 0
            for position, offset, length in batch:
                source(position, stage[start : start + length])
                driver.copy_to_device_async(address + offset, buffer + start, length, stream)
                start += length
            driver.stream_synchronize(stream)

        yield read


def _give_back(call: Callable[[int], None], what: int) -> None:
    # After a device fault these fail as well, and would hide the first error.
    try:
        call(what)
    except CudaError as error:
        _log.warning("after filling a region: %s", error)
