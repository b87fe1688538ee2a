"""Bytes to typed messages and back: MessagePack by ``msgpack``, types by ``msgspec``.

msgpack bounds strings, binaries, arrays and maps while it reads; msgspec then admits only the
fields and types that :mod:`.messages` declares, so that a deeper or other structure than declared
is refused. There is no extension type, no object hook and nothing that could run code.
"""

from __future__ import annotations

from typing import Any, TypeVar, overload

import msgpack
import msgspec

from . import limits
from .errors import BadMessage, TooLarge

T = TypeVar("T")


def _refuse_extension(code: int, data: bytes) -> Any:
    raise BadMessage(f"MessagePack extension type {code} is not part of the protocol")


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
        tree = msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            use_list=True,
            ext_hook=_refuse_extension,
            timestamp=0,
            max_str_len=max(limits.NAME, limits.TEXT) * 4,  # bytes of UTF-8
            max_bin_len=limits.PROBE,
            max_array_len=limits.TENSORS,
            max_map_len=64,
            max_ext_len=0,
        )
    except BadMessage:
        raise
    except Exception as error:  # noqa: BLE001
        # msgpack raises ValueError, its own ExtraData/StackError, UnicodeDecodeError, OverflowError
        # and, for some malformed input, TypeError; all mean the same to the peer.
        raise BadMessage(f"not a MessagePack message: {_describe(error)}") from None
    try:
        # builtin_types: bytes are bytes here, never base64 text.
        return msgspec.convert(tree, kind, strict=True, builtin_types=(bytes,))
    except msgspec.ValidationError as error:
        raise BadMessage(f"not a valid message: {_without_value(str(error))}") from None
    except RecursionError:
        raise BadMessage("not a valid message: nested too deeply") from None


def _without_value(text: str) -> str:
    """msgspec quotes an unknown tag or choice; the peer's text has no place in errors and logs."""
    if not text.startswith("Invalid value "):
        return text
    return f"an unknown type or choice - at {text.rpartition(' - at ')[2]}"


def _describe(error: Exception) -> str:
    text = str(error)
    return f"{type(error).__name__}" if not text or len(text) > 120 else text
