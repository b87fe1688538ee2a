"""Writes docs/protocol.md from the message types, limits and errors: `make docs`.

Everything but the introduction comes from the code: docstrings, the comments behind fields, bounds,
defaults. A test fails when the committed file is another than what this writes, and this fails when
a message has no docstring.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import importlib
import inspect
import json
import operator
import re
import sys
import tokenize
from collections.abc import Callable, Iterator
from functools import cache
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, get_args, get_origin

import msgspec
from xdit_sidecar.protocol import endpoints, errors, limits, manifest, messages, version

FILE = Path(__file__).resolve().parent.parent / "docs/protocol.md"
TEMPLATE = Path(__file__).with_name("protocol_reference.md")

Struct = type[msgspec.Struct]

#: Module of the messages → its heading.
CONVERSATIONS = {
    "stream": "Session stream",
    "control": "Control socket",
    "jobs": "Bulk socket: jobs",
    "tasks": "Bulk socket: tasks of ranks",
    "status": "Status",
    "components": "Components",
    "envelopes": "Envelopes",
}
#: Bounded plain types that fields name.
NAMED_TYPES = {
    "fields": "Name Text Count Bytes Device Fingerprint Role RegionId LeaseId Token RegionKind",
    "jobs": "Digest ComputeDtype RefLatentsMethod Parts Components Adapters",
}
_NEVER_TRAVEL = "# Raised by the client itself; they never travel."
_UNITS = ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB"))
_OPERATIONS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Pow: operator.pow,
}
_WORDS = {"str": "text", "int": "integer", "float": "number", "bytes": "bytes", "bool": "bool"}


class Undocumented(Exception):
    """A message without a docstring."""


# --- what the code says ---------------------------------------------------------------------------


def module(name: str) -> ModuleType:
    """A module of the messages."""
    return importlib.import_module(f"{messages.__name__}.{name}")


def structs_of(where: ModuleType) -> list[Struct]:
    """The structures that a module declares, in its order."""
    found = [
        kind
        for kind in vars(where).values()
        if inspect.isclass(kind)
        and issubclass(kind, msgspec.Struct)
        and kind.__module__ == where.__name__
    ]
    return [kind for kind in found if kind is not messages.Message]


def documentation(kind: type) -> str:
    """A docstring as Markdown. Raises Undocumented."""
    text = inspect.cleandoc(kind.__dict__.get("__doc__") or "").strip()
    if not text:
        raise Undocumented(f"{kind.__module__}.{kind.__qualname__} has no docstring")
    text = re.sub(r":class:`~?(?:[\w.]*\.)?(\w+)`", _link_or_code, text)
    text = re.sub(r":\w+:`~?\.*([\w.]+)`", r"`\1`", text)
    return text.replace("``", "`")


def _link_or_code(match: re.Match[str]) -> str:
    name = match[1]
    return link(name) if name in documented() else f"`{name}`"


@cache
def documented() -> dict[str, Struct]:
    """Every structure that the reference has a heading for, by name."""
    places = [*map(module, CONVERSATIONS), manifest]
    return {kind.__name__: kind for where in places for kind in structs_of(where)}


def link(name: str) -> str:
    return f"[{name}](#{name.lower()})"


@cache
def comments_of(where: ModuleType) -> dict[int, str]:
    """Line → the comment that ends it."""
    lines = tokenize.generate_tokens(StringIO(inspect.getsource(where)).readline)
    return {
        token.start[0]: token.string.removeprefix("#").strip()
        for token in lines
        if token.type == tokenize.COMMENT and token.line[: token.start[1]].strip()
    }


def field_comments(kind: type) -> dict[str, str]:
    """Field → the comment behind it."""
    where = sys.modules[kind.__module__]
    comments = comments_of(where)
    (body,) = [
        node.body
        for node in ast.parse(inspect.getsource(where)).body
        if isinstance(node, ast.ClassDef) and node.name == kind.__name__
    ]
    return {
        node.target.id: comments.get(node.end_lineno or 0, "")
        for node in body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


# --- types and bounds -----------------------------------------------------------------------------


def size(value: int) -> str:
    """Bytes: 2097152 as "2 MiB"."""
    for power, unit in _UNITS:
        if value % (1 << power) == 0 and value >> power < 1024:
            return f"{value >> power} {unit}"
    return f"{value:,} bytes"


def count(value: float) -> str:
    """Anything else: 8192 as "8,192", 2**53 as "2^53"."""
    if value != int(value):
        return f"{value:g}"
    for exact, suffix in ((int(value), ""), (int(value) + 1, " - 1")):
        if exact > 1 << 16 and exact.bit_count() == 1:
            return f"2^{exact.bit_length() - 1}{suffix}"
    return f"{int(value):,}"


def _bounds(meta: msgspec.Meta, of: str) -> str:
    words = []
    low, high = (meta.ge, meta.le) if meta.gt is None else (meta.gt, meta.le)
    if low is not None and high is not None:
        words.append(f"{'over ' if meta.gt is not None else ''}{count(low)} to {count(high)}")
    elif low is not None:
        words.append(f"from {count(low)}")
    if meta.min_length is not None and meta.min_length == meta.max_length:
        words.append(f"exactly {count(meta.min_length)}")
    else:
        if meta.min_length is not None:
            words.append(f"at least {count(meta.min_length)}")
        if meta.max_length is not None:
            long = " characters" if of == "text" else ""
            words.append(f"at most {count(meta.max_length)}{long}")
    if meta.pattern is not None:
        words.append("`" + meta.pattern.replace("|", "\\|") + "`")
    return ", ".join(words)


def describe(annotation: Any) -> str:
    """A type in words, with its bounds."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is type(None):
        return "nil"
    if origin is Annotated:
        inner = describe(arguments[0])
        bounds = "; ".join(_bounds(m, inner) for m in arguments[1:] if isinstance(m, msgspec.Meta))
        return f"{inner} ({bounds})" if bounds else inner
    if arguments and all(isinstance(a, str) for a in arguments):
        return " or ".join(f'"{choice}"' for choice in arguments)
    if origin is list:
        return f"list of {describe(arguments[0])}"
    if origin is dict:
        return f"map of {describe(arguments[0])} to {describe(arguments[1])}"
    if origin is tuple:
        return f"pair of {' and '.join(map(describe, arguments))}"
    if arguments:
        return " or ".join(map(describe, arguments))
    if isinstance(annotation, type) and issubclass(annotation, msgspec.Struct):
        return link(annotation.__name__)
    return _WORDS.get(annotation.__name__, annotation.__name__)


def field_type(kind: type, name: str) -> str:
    """A field's type: bounded types by the names that the table of types explains."""
    where = vars(sys.modules[kind.__module__])
    source = next(c.__annotations__ for c in kind.__mro__ if name in c.__annotations__)[name]
    return _describe_source(ast.parse(str(source), mode="eval").body, where)


def _describe_source(node: ast.expr, names: dict[str, Any]) -> str:
    if isinstance(node, ast.Name) and node.id in _public_types():
        return f"[{node.id}](#types)"
    if isinstance(node, ast.BinOp):
        return " or ".join(_describe_source(side, names) for side in (node.left, node.right))
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
        parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if node.value.id == "Annotated":
            inner = _describe_source(parts[0], names)
            return f"{inner} ({_bounds(_value(parts[1], names), inner)})"
        if node.value.id == "list":
            return f"list of {_describe_source(parts[0], names)}"
        if node.value.id == "dict":
            key, value = (_describe_source(part, names) for part in parts)
            return f"map of {key} to {value}"
        if node.value.id == "tuple":
            return f"pair of {' and '.join(_describe_source(part, names) for part in parts)}"
    return describe(_value(node, names))


def _value(node: ast.expr, names: dict[str, Any]) -> Any:
    """What the few expressions that annotations are made of stand for."""
    match node:
        case ast.Constant(value):
            return type(None) if value is None else value
        case ast.Name(name):
            return getattr(builtins, name, None) or names[name]
        case ast.Attribute(owner, name):
            return getattr(_value(owner, names), name)
        case ast.UnaryOp(ast.USub(), operand):
            return -_value(operand, names)
        case ast.BinOp(left, operation, right):
            return _OPERATIONS[type(operation)](_value(left, names), _value(right, names))
        case ast.Tuple(elements):
            return tuple(_value(element, names) for element in elements)
        case ast.Subscript(owner, inside):
            return _value(owner, names)[_value(inside, names)]
        case ast.Call(function, [], keywords):
            given = {word.arg or "": _value(word.value, names) for word in keywords}
            return _value(function, names)(**given)
    raise TypeError(f"an annotation with {ast.unparse(node)}: teach it to {__name__}")


@cache
def _public_types() -> dict[str, Any]:
    return {
        name: getattr(module(where), name)
        for where, names in NAMED_TYPES.items()
        for name in names.split()
    }


def _default(field: msgspec.structs.FieldInfo) -> str:
    if field.default_factory is not msgspec.NODEFAULT:
        return f"`{field.default_factory()}`"
    if field.default is msgspec.NODEFAULT:
        return "required"
    if field.default is None:
        return "nil"
    return f"`{json.dumps(field.default)}`"


# --- who says it to whom --------------------------------------------------------------------------


def members(union: Any) -> set[type]:
    """The classes of a union."""
    return set(get_args(union)) if get_origin(union) is not None or get_args(union) else {union}


def directions(kind: type) -> list[str]:
    """Who sends a message to whom, and on which socket."""
    rank_says = {messages.NextTask}
    found = []
    if kind in members(messages.StreamMessage):
        way = "client → broker" if kind is messages.Hello else "broker → client"
        found.append(f"{way}, session stream")
    if kind in members(messages.RequestBody):
        found.append("client → broker, control socket")
    if kind in members(messages.BulkBody) - rank_says:
        found.append("client → broker, bulk socket")
    if kind in rank_says:
        found.append("rank → broker, bulk socket")
    if kind in members(messages.Task):
        found.append("broker → rank, bulk socket")
    elif kind in members(messages.AnswerBody):
        found.append("broker → client")
    if kind in members(messages.Outcome):
        found.append("rank → broker, as an outcome")
    return found


def _users(kind: type) -> list[str]:
    """The structures that have a field of this type."""
    here = link(kind.__name__)
    return [
        link(name)
        for name, other in documented().items()
        if other is not kind
        and any(
            here in field_type(other, f.name) or kind in _inside(f.type)
            for f in msgspec.structs.fields(other)
        )
    ]


def _inside(annotation: Any) -> Iterator[Any]:
    yield annotation
    for argument in get_args(annotation):
        yield from _inside(argument)


# --- the text -------------------------------------------------------------------------------------


def describe_struct(kind: Struct) -> str:
    """One structure: its tag, who says it, its docstring, its fields."""
    config = kind.__struct_config__
    facts = [f"`{config.tag}`"] if config.tag else []
    facts += directions(kind)
    if not directions(kind) and (users := _users(kind)):
        facts.append(f"part of {', '.join(users)}")
    if config.array_like:
        facts.append("an array, its fields in this order")
    lines = [f"### {kind.__name__}", " · ".join(facts), documentation(kind)]
    comments: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if base in (*documented().values(), kind):
            comments |= field_comments(base)
    rows = [
        f"| `{field.encode_name}` | {field_type(kind, field.name)} | {_default(field)} "
        f"| {comments.get(field.name, '')} |"
        for field in msgspec.structs.fields(kind)
    ]
    if rows:
        lines.append(
            "\n".join(["| field | type | default | |", "| --- | --- | --- | --- |", *rows])
        )
    return "\n\n".join(line for line in lines if line)


def describe_conversation(name: str) -> str:
    """The structures of a module below its heading."""
    introduction = inspect.cleandoc(module(name).__doc__ or "")
    introduction = re.sub(r":class:`~?[\w.]*?(\w+)`", _link_or_code, introduction)
    parts = [f"## {CONVERSATIONS[name]}", introduction]
    parts += map(describe_struct, structs_of(module(name)))
    if name == "components":
        parts.append(describe_struct(manifest.TensorSpec))
    return "\n\n".join(parts)


def describe_types() -> str:
    """The bounded types by name."""
    rows = [f"| {name} | {describe(kind)} |" for name, kind in _public_types().items()]
    return "\n".join(["| type | |", "| --- | --- |", *rows])


def describe_limits() -> str:
    """The numbers of limits.py with its comments, group by group."""
    lines = inspect.getsource(limits).splitlines()
    first = next(n for n, line in enumerate(lines) if line.startswith("# "))
    comments, parts = comments_of(limits), []
    heading: list[str] = []
    for at, line in enumerate(lines[first:], first + 1):
        if line.startswith("# "):
            heading.append(line.removeprefix("# "))
        elif found := re.match(r"([A-Z_]+): Final = ([^#]*)", line):
            if heading:
                parts += ["", " ".join(heading), "", "| limit | | |", "| --- | --- | --- |"]
                heading = []
            value = getattr(limits, found[1])
            is_size = re.search(r"[KMG]IB|<< 42", found[2])
            said = comments.get(at, "")
            parts.append(f"| `{found[1]}` | {(size if is_size else count)(value)} | {said} |")
    return "\n".join(parts).strip()


def describe_errors(*, travel: bool) -> str:
    """The error codes, those that travel or those that the client raises by itself."""
    ahead, _, behind = inspect.getsource(errors).partition(_NEVER_TRAVEL)
    source = ahead if travel else behind
    names = re.findall(r"^class (\w+)\(", source, re.MULTILINE)
    kinds = [getattr(errors, name) for name in names if name != "SidecarError"]
    rows = [
        f"| `{kind.code}` | {kind.__name__} | {'yes' if kind.retryable else ''} "
        f"| {' '.join(documentation(kind).split())} |"
        for kind in kinds
    ]
    return "\n".join(["| code | class | retryable | |", "| --- | --- | --- | --- |", *rows])


def render() -> str:
    """The whole reference."""
    places = endpoints.Endpoints(Path("DIR"))
    filled = {
        "version": str(version.PROTOCOL_VERSION),
        "preamble": " ".join(f"{byte:02x}" for byte in version.encode_preamble()),
        "session": places.session.name,
        "control": places.control.name,
        "bulk": places.bulk.name,
        "lock": places.lock.name,
        "hello_seconds": f"{limits.HELLO_SECONDS:g}",
        "stream_frame": size(limits.STREAM_FRAME),
        "control_frame": size(limits.CONTROL_FRAME),
        "bulk_frame": size(limits.BULK_FRAME),
        "bulk_message": size(limits.BULK_MESSAGE),
        "bulk_parts": str(limits.BULK_PARTS),
        "in_flight": str(limits.REQUESTS_IN_FLIGHT),
        "granule": size(limits.REGION_GRANULE),
        "conversations": "\n\n".join(map(describe_conversation, CONVERSATIONS)),
        "types": describe_types(),
        "limits": describe_limits(),
        "errors": describe_errors(travel=True),
        "own_errors": describe_errors(travel=False),
    }
    text = TEMPLATE.read_text("utf-8")
    text = re.sub(r"\{\{(\w+)\}\}", lambda match: filled[match[1]], text)
    return text.rstrip() + "\n"


def main() -> int:
    """Write the file, or with --check only tell whether it is up to date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; 1: it is out of date")
    check = parser.parse_args().check
    text = render()
    if FILE.exists() and FILE.read_text("utf-8") == text:
        return 0
    if check:
        print(f"{FILE.name} is out of date: `make docs` writes it", file=sys.stderr)
        return 1
    FILE.write_text(text, "utf-8")
    print(f"wrote {FILE.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
