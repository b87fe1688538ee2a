"""A safetensors file: its header, read and checked; the weights stay where they are.

The layout is 8 bytes of header length (little-endian), the header as JSON, then the tensors' bytes.
"""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta

from . import limits
from .errors import BadFile
from .manifest import DTYPE_BYTES, TensorSpec

_LENGTH_BYTES = 8
_SNIFFED_BYTES = 512
_SUPPORTED = "only .safetensors files are supported"
_ADVICE = "copy or download it again"


class FileIdentity(NamedTuple):
    """What changes when a file is replaced or written: of an open descriptor, times in ns."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, descriptor: int) -> FileIdentity:
        """The identity now. Raises OSError."""
        found = os.fstat(descriptor)
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


class FileTensor(NamedTuple):
    """One tensor of a file, ``position`` bytes from the file's start; ``spec`` has offset 0."""

    spec: TensorSpec
    position: int


_Position = Annotated[int, Meta(ge=0, le=limits.REGION)]


class _Entry(msgspec.Struct):
    dtype: str
    shape: Annotated[
        list[Annotated[int, Meta(ge=0, le=limits.REGION)]], Meta(max_length=limits.DIMENSIONS)
    ]
    data_offsets: tuple[_Position, _Position]


class SafetensorsFile:
    """An open file whose header made sense. A context manager; keeps a descriptor of its own.

    ``label`` is the file's name for people, ``tensors`` are in the order of their bytes,
    ``header`` is the JSON as it lies in the file, ``metadata`` its ``__metadata__``. Both ways to
    open one raise :class:`~.errors.BadFile` and read nothing but the header.
    """

    def __init__(self, descriptor: int, label: str) -> None:
        """Use :meth:`open` or :meth:`from_descriptor`. Takes over ``descriptor``."""
        self.descriptor = descriptor
        self.label = label
        try:
            self.identity = self._identify()
            self.header = self._read_header()
            self.metadata, self.tensors = self._parse_header()
            self.check_unchanged()
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> SafetensorsFile:
        """The file at ``path``."""
        shown = _shorten(os.fspath(path))
        try:
            # A named pipe would wait for a writer.
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            raise BadFile(f"{shown} does not exist: check the path") from None
        except PermissionError:
            raise BadFile(
                f"{shown} may not be read by uid {os.geteuid()}: check its owner and mode, and "
                "those of the folders above"
            ) from None
        except (OSError, ValueError) as error:
            raise BadFile(f"{shown} cannot be opened: {_reason(error)}; check the path") from None
        return cls(descriptor, Path(path).name)

    @classmethod
    def from_descriptor(cls, descriptor: int, label: str) -> SafetensorsFile:
        """The file behind a descriptor that is open for reading; it stays the caller's."""
        try:
            own = os.dup(descriptor)
        except OSError as error:
            raise BadFile(
                f"{_shorten(label)}: the descriptor cannot be used: {_reason(error)}"
            ) from None
        return cls(own, label)

    def check_unchanged(self) -> None:
        """Raise BadFile if the file was written, truncated or touched since it was opened."""
        if self._identify() != self.identity:
            raise BadFile(
                f"{self._shown} changed while it was read, so its weights may be a mixture: wait "
                "until whatever writes it is done, then try again"
            )

    def close(self) -> None:
        """Close the descriptor. Safe to call twice."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # --- reading

    @property
    def _shown(self) -> str:
        return _shorten(self.label)

    def _identify(self) -> FileIdentity:
        try:
            mode = os.fstat(self.descriptor).st_mode
            identity = FileIdentity.of(self.descriptor)
        except OSError as error:
            raise BadFile(f"{self._shown} cannot be read: {_reason(error)}") from None
        if stat.S_ISDIR(mode):
            raise BadFile(
                f"{self._shown} is a directory: name one .safetensors file in it "
                "(diffusers folders and sharded models are not supported)"
            )
        if not stat.S_ISREG(mode):
            raise BadFile(f"{self._shown} is a device, pipe or socket: {_SUPPORTED}")
        return identity

    def _read(self, length: int, position: int) -> bytes:
        data = b""
        try:
            while len(data) < length and (
                more := os.pread(self.descriptor, length - len(data), position + len(data))
            ):
                data += more
        except OSError as error:
            raise BadFile(f"{self._shown} cannot be read: {_reason(error)}") from None
        return data

    def _read_header(self) -> bytes:
        start = self._read(_SNIFFED_BYTES, 0)
        length = int.from_bytes(start[:_LENGTH_BYTES], "little")
        if start[_LENGTH_BYTES : _LENGTH_BYTES + 1] != b"{":
            raise BadFile(f"{self._shown} {_describe(start)}: {_SUPPORTED}")
        if length > limits.SAFETENSORS_HEADER:
            raise BadFile(
                f"{self._shown} announces a header of {length} bytes, the format allows "
                f"{limits.SAFETENSORS_HEADER}: it is damaged or no safetensors file; {_ADVICE}"
            )
        if _LENGTH_BYTES + length > self.identity.size:
            raise BadFile(
                f"{self._shown} is truncated: its header ends at byte {_LENGTH_BYTES + length}, "
                f"the file at byte {self.identity.size}; {_ADVICE}"
            )
        return self._read(length, _LENGTH_BYTES)

    # --- understanding

    def _parse_header(self) -> tuple[dict[str, str], list[FileTensor]]:
        try:
            found = json.loads(self.header.decode(), object_pairs_hook=_no_duplicates)
        except (ValueError, RecursionError) as error:
            raise self._bad_header(f"is no valid JSON ({_reason(error)})") from None
        if not isinstance(found, dict):
            raise self._bad_header("is no table of tensors")
        given = found.pop("__metadata__", None)
        try:
            metadata = msgspec.convert(given or {}, dict[str, str])
        except msgspec.ValidationError as error:
            raise self._bad_header(f"has metadata that is not text ({error})") from None
        if len(found) > limits.TENSORS:
            raise BadFile(
                f"{self._shown} has {len(found)} tensors, at most {limits.TENSORS} are supported"
            )
        tensors = [self._parse_tensor(name, entry) for name, entry in found.items()]
        tensors.sort(key=lambda tensor: tensor.position)  # stable: the empty ones stay in order
        self._check_ranges(tensors)
        return metadata, tensors

    def _parse_tensor(self, name: str, entry: object) -> FileTensor:
        if not 1 <= len(name) <= limits.NAME or not (name.isascii() and name.isprintable()):
            raise BadFile(
                f"{self._shown} has a tensor name of {len(name)} characters, {_shorten(name)}: 1 "
                f"to {limits.NAME} printable ASCII characters are supported"
            )
        try:
            parsed = msgspec.convert(entry, _Entry)
        except msgspec.ValidationError as error:
            raise self._bad_header(f"describes tensor {name!r} wrongly ({error})") from None
        itemsize = DTYPE_BYTES.get(parsed.dtype)
        if itemsize is None:
            raise BadFile(
                f"{self._shown}: tensor {name!r} has the dtype {_shorten(parsed.dtype)}; supported "
                f"are {', '.join(DTYPE_BYTES)}"
            )
        begin, end = parsed.data_offsets
        nbytes = prod(parsed.shape) * itemsize
        if end - begin != nbytes:
            raise self._bad_header(
                f"gives tensor {name!r} bytes {begin} to {end}, its shape and dtype need {nbytes}"
            )
        data = _LENGTH_BYTES + len(self.header)
        if data + end > self.identity.size:
            raise BadFile(
                f"{self._shown} is truncated: tensor {name!r} ends at byte {data + end}, the file "
                f"at byte {self.identity.size}; {_ADVICE}"
            )
        return FileTensor(TensorSpec(name, parsed.dtype, parsed.shape), data + begin)

    def _check_ranges(self, tensors: Sequence[FileTensor]) -> None:
        # Else a small file could describe a huge component.
        end, previous = 0, ""
        for spec, position in tensors:
            nbytes = spec.nbytes
            if nbytes and position < end:
                raise self._bad_header(f"lets tensors {previous!r} and {spec.name!r} overlap")
            if nbytes:
                end, previous = position + nbytes, spec.name

    def _bad_header(self, what: str) -> BadFile:
        return BadFile(f"{self._shown}: the safetensors header {what}; {_ADVICE}")


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table = dict(pairs)
    if len(table) != len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{_shorten(twice)} appears twice")
    return table


def _describe(start: bytes) -> str:
    """What the first bytes of a file that is no safetensors look like."""
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not start:
        return "is empty"
    if start.startswith(b"GGUF"):
        return "is a GGUF file"
    if start.startswith(b"PK\x03\x04"):
        return "is a zip archive (a pickled checkpoint, .pt, .ckpt or .bin)"
    if start[0] == 0x80 and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "is a pickled checkpoint (.pt, .ckpt or .bin), which could run code"
    if start.startswith(b"version https://git-lfs"):
        return "is a git-lfs pointer, not the weights (run `git lfs pull` to fetch them)"
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "is a web page, not weights (an error or login page was saved instead of the file)"
    if text.startswith(b"{"):
        return "is bare JSON (perhaps an index of shards, or an error message)"
    if len(start) <= _LENGTH_BYTES:
        return f"is truncated after {len(start)} bytes, before its header"
    return f"is no safetensors file (it begins with the bytes {start[:8].hex(' ')})"


def _shorten(text: object) -> str:
    """For errors: what a file says may be long, and may hold control characters."""
    shown = repr(os.fsdecode(text) if isinstance(text, bytes) else text)
    return shown if len(shown) <= 160 else f"{shown[:100]}…{shown[-50:]}"


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return os.strerror(error.errno or 0)
    text = "nested too deeply" if isinstance(error, RecursionError) else str(error)
    return text if len(text) <= 160 else f"{text[:160]}…"
