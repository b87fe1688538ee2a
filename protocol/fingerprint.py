"""What identifies a component: of a file its identity and header, of tensors their bytes.

A fingerprint also fixes the manifest: two clients that name the same one mean the same layout.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from .errors import BadMessage
from .safetensors_file import SafetensorsFile

if TYPE_CHECKING:
    import torch

# To be raised whenever the same input leads to another manifest than before.
_FILE_KIND = "xdit-sidecar file 1"
_TENSORS_KIND = "xdit-sidecar tensors 1"

_DIGEST_BYTES = 32
_THREADS = 4
_PIECE = 16 * 1024 * 1024


def fingerprint_file(file: SafetensorsFile, dtype: str | None = None, prefix: str = "") -> str:
    """``file:`` and 64 hex digits, without reading a weight.

    Over the file's identity (device, inode, size, mtime, ctime), its header's bytes, the dtype
    that its weights are converted to (a safetensors name; None: as stored) and the prefix that
    selects them. A copy of the file, or the same path written again, is another component.
    """
    wanted = [] if dtype is None else [dtype.encode()]
    fields = [
        _FILE_KIND.encode(),
        *(b"%d" % number for number in file.identity),
        file.header,
        prefix.encode(),
        *wanted,
    ]
    return f"file:{_digest(fields)}"


def fingerprint_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """``bytes:`` and 64 hex digits: a digest of names, dtypes, shapes, order, layout and bytes.

    For objects in memory that no file vouches for. Tensors may be on any device and have any
    strides; those of a GPU are copied to the host in pieces of 16 MiB, after all work queued on it.
    Reads every byte: about 1 GB/s per core. Raises BadMessage for tensors that cannot be shared.
    """
    import torch

    from .regions.views import describe_tensors

    for name, tensor in tensors.items():
        if tensor.device.type not in ("cpu", "cuda"):
            raise BadMessage(
                f"tensor {name!r} is on {tensor.device}: only tensors with bytes on the CPU or a "
                "CUDA device can be shared"
            )
    specs = describe_tensors(tensors)
    # The pool's threads use the default stream, which does not wait for the caller's.
    for device in {tensor.device for tensor in tensors.values() if tensor.is_cuda}:
        torch.cuda.synchronize(device)
    # hashlib lets other threads run meanwhile.
    with ThreadPoolExecutor(_THREADS, "xdit-sidecar-digest") as pool:
        digests = list(pool.map(_digest_tensor, tensors.values()))
    fields = [_TENSORS_KIND.encode()]
    for spec, digest in zip(specs, digests, strict=True):
        numbers = (spec.shape, spec.offset, spec.strides)
        fields += [spec.name.encode(), spec.dtype.encode(), repr(numbers).encode(), digest]
    return f"bytes:{_digest(fields)}"


def _digest(fields: Iterable[bytes]) -> str:
    """blake2b-256 of a list of byte strings: the lengths make it unambiguous."""
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for field in fields:
        digest.update(b"%d:" % len(field))
        digest.update(field)
    return digest.hexdigest()


def _digest_tensor(tensor: torch.Tensor) -> bytes:
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for piece in _pieces(tensor.detach()):
        digest.update(piece.cpu().numpy().data)
    return digest.digest()


def _pieces(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The elements in row-major order, as flat uint8 tensors of about 16 MiB."""
    import torch

    if not tensor.numel():
        return
    if tensor.is_contiguous():
        flat = tensor.reshape(-1).view(torch.uint8)
        for start in range(0, flat.numel(), _PIECE):
            yield flat[start : start + _PIECE]
        return
    # Row by row, so that no second copy of the whole tensor comes into being.
    rows = max(1, _PIECE // (tensor[0].numel() * tensor.element_size()))
    for start in range(0, len(tensor), rows):
        yield tensor[start : start + rows].contiguous().reshape(-1).view(torch.uint8)
