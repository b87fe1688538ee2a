"""Every bound of the protocol in one place.

Sizes are in bytes, times in seconds. A peer that exceeds a bound gets a typed error or loses its
connection; it never makes the daemon allocate more than these numbers allow.
"""

from __future__ import annotations

from typing import Final

KIB: Final = 1024
MIB: Final = 1024 * KIB
GIB: Final = 1024 * MIB

# ZeroMQ. One control message is one frame; bulk messages are a header and up to BULK_PARTS - 1
# raw frames. libzmq drops the connection of a peer whose frame announces more than *_FRAME.
CONTROL_FRAME: Final = 4 * MIB  # the largest manifest and the largest status fit
BULK_FRAME: Final = 64 * MIB
CONTROL_PARTS: Final = 1
BULK_PARTS: Final = 20  # a header, JOB_TENSORS frames, and what large tensors have more
BULK_MESSAGE: Final = 256 * MIB
CONTROL_QUEUE: Final = 32  # messages that may wait in either direction of one connection
BULK_QUEUE: Final = 8
SOCKET_BUFFER: Final = MIB  # of a connection, in the kernel; the system may allow less
CONNECTIONS: Final = 1024  # ZeroMQ connections at once, per socket
UNREAD_MEMORY: Final = 512 * MIB  # growth of the broker above which connections are shed

# Session streams. Descriptors ride on frames; control work goes over ZeroMQ, so frames are small.
STREAM_FRAME: Final = 64 * KIB
STREAM_BACKLOG: Final = 256 * KIB  # unsent bytes after which a peer that never reads is dropped
DESCRIPTORS_PER_FRAME: Final = 1
SESSIONS: Final = 128
UNGREETED_SESSIONS: Final = 64  # accepted streams that have not said hello yet
HELLO_SECONDS: Final = 5.0
REQUESTS_IN_FLIGHT: Final = 64  # unanswered requests of one session

# Contents of messages.
NESTING: Final = 8  # containers in containers; the declared types bound it (a test proves it)
TENSORS: Final = 8192  # per manifest: T5-XXL has 219, a FLUX transformer 780
DIMENSIONS: Final = 8
NAME: Final = 256  # tensor and file names, in characters
TEXT: Final = 1024  # labels, versions, error messages
REGION: Final = 1 << 42  # 4 TiB: more than any device of today
REGION_GRANULE: Final = 2 * MIB
TENSOR_ALIGNMENT: Final = 512
PROBE: Final = 4 * KIB  # bytes read or written by one
PROBE_ROOM: Final = 8 * MIB  # by how much regions of probes may exceed a device's budget
COMPONENTS: Final = 512
CATALOG_TENSORS: Final = 1 << 17  # of all components together: about 150 MB at the very worst
LEASES_PER_SESSION: Final = 1024
WAITERS_PER_COMPONENT: Final = 256

# safetensors headers (the format's own bound is 100 MB).
SAFETENSORS_HEADER: Final = 100_000_000

# Jobs for the ranks.
RANKS: Final = 64
TRANSFORMERS: Final = 8  # of which a rank tells how they run
JOBS: Final = 256  # waiting or running, of all sessions together
JOB_TENSORS: Final = 15
JOB_OUTPUT: Final = 240 * MIB  # of all outputs of one job: a picture of 4096² as floats fits
JOB_COMPONENTS: Final = 8
JOB_ADAPTERS: Final = 32
JOB_BYTES: Final = 512 * MIB  # raw frames of all jobs that wait
SCRATCH: Final = 64 * MIB  # of one scratch region
SCRATCHES_PER_SESSION: Final = 8
SCRATCHES: Final = 256  # of all sessions together
SCRATCH_BYTES: Final = 512 * MIB
SCRATCH_ALIGNMENT: Final = 64
KEPT_TENSORS: Final = 256  # named by digest, of all sessions together
KEPT_BYTES: Final = 512 * MIB  # of device memory, on each rank
