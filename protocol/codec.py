"""Bytes to typed messages and back: MessagePack, packed by ``msgpack``, read by ``msgspec``.

What arrives is typed while it is read: only the fields and types that :mod:`.messages` declares
come into being, whatever the bytes announce, and a structure deeper or other than declared is
refused. (``msgpack.unpackb`` would first build any tree: seconds for megabytes of empty lists.)
There is no extension type, no object hook and nothing that could run code.
"""

from __future__ import annotations

import functools
from typing import Any, TypeVar, overload

import msgpack
import msgspec

from .errors import BadMessage, TooLarge

T = TypeVar("T")


def encode(message: msgspec.Struct) -> bytes:
    """One message as MessagePack bytes.

    Raises :class:`~.errors.BadMessage` for text that is not Unicode (a file name in no encoding).
    """
    builtins = msgspec.to_builtins(message, builtin_types=(bytes,))
    try:
        packed: bytes = msgpack.packb(builtins, use_bin_type=True)
    except UnicodeEncodeError:
        raise BadMessage(f"a text of {type(message).__name__} is not valid Unicode") from None
    return packed


@overload
def decode(data: bytes | memoryview, kind: type[T], *, limit: int) -> T: ...


@overload
def decode(data: bytes | memoryview, kind: Any, *, limit: int) -> Any: ...


def decode(data: bytes | memoryview, kind: Any, *, limit: int) -> Any:
    """``data`` as a message of type ``kind`` (a Struct or a tagged union of them).

    Raises :class:`~.errors.TooLarge` above ``limit`` bytes and :class:`~.errors.BadMessage` for
    anything that is not exactly such a message; the text names the field, never its value.
    """
    if len(data) > limit:
        raise TooLarge(f"a message of {len(data)} bytes exceeds the limit of {limit}")
    try:
        return _decoder(kind).decode(data)
    except msgspec.ValidationError as error:
        raise BadMessage(f"not a valid message: {_without_value(str(error))}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadMessage(f"not a MessagePack message ({type(error).__name__})") from None


@functools.cache
def _decoder(kind: Any) -> msgspec.msgpack.Decoder[Any]:
    return msgspec.msgpack.Decoder(kind, strict=True)


def _without_value(text: str) -> str:
    """msgspec quotes an unknown tag or choice; the peer's text has no place in errors and logs."""
    if not text.startswith("Invalid "):
        return text
    return f"an unknown type or choice - at {text.rpartition(' - at ')[2]}"
