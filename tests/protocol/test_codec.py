"""Bytes of strangers become typed messages or BadMessage, never anything else."""

from __future__ import annotations

import re
from typing import Any, get_args

import msgpack
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xdit_sidecar.daemon.keeper import messages as k
from xdit_sidecar.protocol import codec, limits
from xdit_sidecar.protocol import messages as m
from xdit_sidecar.protocol.errors import BadMessage, TooLarge

LIMIT = limits.CONTROL_FRAME
UNIONS: list[Any] = [
    m.StreamMessage,
    m.Request,
    m.Answer,
    m.BulkRequest,
    k.KeeperRequest,
    k.KeeperAnswer,
]
SECRET = b"\xa5secret\x5a" * 8  # 64 bytes: as long as a handle

# --- instances of every declared type


def instances(info: Any) -> st.SearchStrategy[Any]:
    """Values of a type, as msgspec describes it, within its bounds."""
    match info:
        case msgspec.inspect.Metadata(type=inner):
            return instances(inner)
        case msgspec.inspect.NoneType():
            return st.none()
        case msgspec.inspect.BoolType():
            return st.booleans()
        case msgspec.inspect.IntType(ge=low, le=high):
            return st.integers(low if low is not None else -(2**63), high or 2**63 - 1)
        case msgspec.inspect.FloatType(gt=above, ge=low, le=high):
            least = low if above is None else above
            return st.floats(least, high, exclude_min=above is not None, allow_nan=False)
        case msgspec.inspect.StrType(pattern=str(pattern), min_length=shortest):
            return st.from_regex(re.compile(pattern), fullmatch=True).filter(
                lambda text: (shortest or 0) <= len(text) <= limits.NAME
            )
        case msgspec.inspect.StrType(min_length=shortest, max_length=longest):
            return st.text(min_size=shortest or 0, max_size=min(longest or 20, 20))
        case msgspec.inspect.BytesType(min_length=shortest, max_length=longest):
            return st.binary(min_size=shortest or 0, max_size=max(shortest or 0, 16))
        case msgspec.inspect.LiteralType(values=values):
            return st.sampled_from(values)
        case msgspec.inspect.UnionType(types=types):
            return st.one_of([instances(one) for one in types])
        case msgspec.inspect.ListType(item_type=item, min_length=shortest):
            return st.lists(instances(item), min_size=shortest or 0, max_size=3)
        case msgspec.inspect.DictType(key_type=key, value_type=value):
            return st.dictionaries(instances(key), instances(value), max_size=3)
        case msgspec.inspect.VarTupleType(item_type=item):
            return st.lists(instances(item), max_size=3).map(tuple)
        case msgspec.inspect.TupleType(item_types=items):
            return st.tuples(*(instances(one) for one in items))
        case msgspec.inspect.StructType(cls=cls, fields=fields):
            return st.builds(cls, **{f.name: instances(f.type) for f in fields})
    raise AssertionError(f"no instances of {info}")


def structs(kind: Any) -> list[type[msgspec.Struct]]:
    """The members of a union, and of an envelope's body."""
    if members := get_args(kind):
        return list(members)
    body = {f.name: f.type for f in msgspec.structs.fields(kind)}["body"]
    return list(get_args(body)) or [body]


everything = st.one_of(
    [st.tuples(st.just(kind), instances(msgspec.inspect.type_info(kind))) for kind in UNIONS]
)
small = settings(max_examples=100)


@small
@given(everything)
def test_every_message_comes_back(made: tuple[Any, Any]) -> None:
    kind, message = made
    assert codec.decode(codec.encode(message), kind, limit=LIMIT) == message


def members() -> list[tuple[Any, type[msgspec.Struct]]]:
    return [(kind, member) for kind in UNIONS for member in structs(kind)]


@pytest.mark.parametrize(
    ("kind", "member"), members(), ids=lambda value: getattr(value, "__name__", "stream")
)
def test_every_member_comes_back(kind: Any, member: type[msgspec.Struct]) -> None:
    @settings(max_examples=3)
    @given(instances(msgspec.inspect.type_info(member)))
    def check(message: Any) -> None:
        whole = message
        if not get_args(kind):
            head = {"token": b"t" * 32} if "token" in kind.__struct_fields__ else {}
            whole = kind(**head, id=1, body=message)
        decoded = codec.decode(codec.encode(whole), kind, limit=LIMIT)
        assert decoded == whole
        assert type(getattr(decoded, "body", decoded)) is member

    check()


# --- hostile bytes


def only_refused(data: bytes, kind: Any, limit: int = LIMIT) -> None:
    """Whatever it is, it is decoded or refused; the text is short and printable."""
    text = ""
    try:
        codec.decode(data, kind, limit=limit)
    except BadMessage as error:
        text = str(error)
    assert len(text) < 400
    assert text.isprintable()


@settings(max_examples=500)
@given(st.binary(max_size=200), st.sampled_from(UNIONS))
def test_random_bytes(data: bytes, kind: Any) -> None:
    only_refused(data, kind)


trees = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=80),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(st.text(max_size=8) | st.binary(max_size=8) | st.integers(), inner)
    ),
    max_leaves=20,
)


def packable(tree: Any) -> bytes:
    try:
        return msgpack.packb(tree)
    except OverflowError:
        return b"\xc1"


@settings(max_examples=500)
@given(trees, st.sampled_from(UNIONS))
def test_valid_messagepack_of_other_types(tree: Any, kind: Any) -> None:
    only_refused(packable(tree), kind)


@small
@given(everything, trees, st.data())
def test_one_field_of_another_type(made: tuple[Any, Any], wrong: Any, data: st.DataObject) -> None:
    kind, message = made
    tree = msgspec.to_builtins(message, builtin_types=(bytes,))
    here = tree
    while True:
        keys = list(here) if isinstance(here, dict) else list(range(len(here)))
        if not keys:
            break
        chosen = data.draw(st.sampled_from(keys))
        if isinstance(here[chosen], dict | list) and data.draw(st.booleans()):
            here = here[chosen]
            continue
        if isinstance(here, dict) and data.draw(st.booleans()):
            del here[chosen]
        else:
            here[chosen] = wrong
        break
    only_refused(packable(tree), kind)


@small
@given(everything, st.data())
def test_mutated_bytes(made: tuple[Any, Any], data: st.DataObject) -> None:
    kind, message = made
    raw = bytearray(codec.encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        match data.draw(st.integers(0, 3)):
            case 0:
                raw[at] = data.draw(st.integers(0, 255))
            case 1:
                raw[at:at] = data.draw(st.binary(max_size=4))
            case 2:
                del raw[at:]
            case _:
                raw += raw[:at]
        if not raw:
            break
    only_refused(bytes(raw), kind)


def request(**body: Any) -> bytes:
    return msgpack.packb({"token": b"t" * 32, "id": 1, "body": body})


def test_the_good_one_is_good() -> None:
    # Everything below differs from this in one thing.
    assert codec.decode(request(type="ping"), m.Request, limit=LIMIT).body == m.Ping()


def nested(depth: int) -> bytes:
    return b"\x91" * depth + b"\xc0"


BAD: dict[str, bytes] = {
    "nothing": b"",
    "two messages": request(type="ping") * 2,
    "cut": request(type="ping")[:-1],
    "reserved byte": b"\xc1",
    "extension": msgpack.packb({"body": msgpack.ExtType(5, b"x" * 8)}),
    "empty extension": b"\xc7\x00\x05",
    "timestamp": msgpack.packb(msgpack.Timestamp(1, 2)),
    "empty timestamp": b"\xc7\x00\xff",
    "deep nesting": nested(500),
    "deeper nesting": nested(100_000),
    "deep maps": b"\x81\xa1a" * 100_000 + b"\xc0",
    "huge array announced": b"\xdd\xff\xff\xff\xff",
    "huge map announced": b"\xdf\xff\xff\xff\xff",
    "huge string announced": b"\xdb\xff\xff\xff\xff",
    "huge binary announced": b"\xc6\xff\xff\xff\xff",
    "large array announced, nested": b"\xdc\x20\x00" * 2000,
    "int keys": msgpack.packb({1: 2}),
    "nil keys": b"\x81\xc0\xc0",
    "byte keys": msgpack.packb({b"token": b"t" * 32, b"id": 1, b"body": {b"type": b"ping"}}),
    "array keys": b"\x81\x90\xc0",
    "invalid UTF-8": msgpack.packb({"body": b"\xff\xfe"}, use_bin_type=False),
    "surrogates in UTF-8": b"\xa3\xed\xa0\x80",
    "unknown type": request(type="fly"),
    "no type": request(),
    "type of another union": request(type="pong"),
    "text for a token": msgpack.packb({"token": "A" * 44, "id": 1, "body": {"type": "ping"}}),
    "short token": msgpack.packb({"token": b"t", "id": 1, "body": {"type": "ping"}}),
    "float id": msgpack.packb({"token": b"t" * 32, "id": 1.0, "body": {"type": "ping"}}),
    "true as id": msgpack.packb({"token": b"t" * 32, "id": True, "body": {"type": "ping"}}),
    "negative id": msgpack.packb({"token": b"t" * 32, "id": -1, "body": {"type": "ping"}}),
    "huge id": msgpack.packb({"token": b"t" * 32, "id": 2**64 - 1, "body": {"type": "ping"}}),
    "array for a map": msgpack.packb([b"t" * 32, 1, {"type": "ping"}]),
    "upper-case region": request(type="commit", region="F" * 32),
    "short region": request(type="commit", region="f" * 31),
    "number for a region": request(type="commit", region=7),
    "traversing device": request(type="attach", device="../cpu", fingerprint="file:" + "0" * 64),
    "probe of too much": request(type="probe", region="f" * 32, length=limits.PROBE + 1),
    "probe by someone": request(type="probe", region="f" * 32, reader="broker"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused(name: str) -> None:
    with pytest.raises(BadMessage) as refused:
        codec.decode(BAD[name], m.Request, limit=LIMIT)
    assert str(refused.value).isprintable()


def test_the_size_is_looked_at_first() -> None:
    with pytest.raises(TooLarge, match="101 bytes exceeds the limit of 100"):
        codec.decode(b"\xc1" * 101, m.Request, limit=100)


def test_the_text_names_the_field_and_not_its_value() -> None:
    hostile = "fly\n" + "x" * 1000 + "` - at `$.token"
    for data in (
        request(type=hostile),
        request(type="commit", region=hostile),
        request(type="probe", region="f" * 32, reader=hostile),
    ):
        with pytest.raises(BadMessage) as refused:
            codec.decode(data, m.Request, limit=LIMIT)
        assert "$.body." in str(refused.value)
        assert "xxx" not in str(refused.value)


def test_text_that_is_not_unicode_is_refused_before_it_is_sent() -> None:
    # os.fsdecode of a file name in no encoding gives such text.
    component = m.Component(
        fingerprint="file:" + "0" * 64, role="vae", label="\udcff.safetensors", tensors=[]
    )
    with pytest.raises(BadMessage, match="Unicode"):
        codec.encode(m.HandOver(device="cpu", component=component))


# --- newer minors


@small
@given(everything, st.sampled_from([None, 7, "text", b"bytes", [1, [2]], {"a": {"b": []}}]))
def test_unknown_fields_are_ignored(made: tuple[Any, Any], value: Any) -> None:
    kind, message = made
    tree = msgspec.to_builtins(message, builtin_types=(bytes,))
    tree["a_newer_field"] = tree["body"] = tree.get("body", value)
    if isinstance(tree["body"], dict):
        tree["body"]["a_newer_field"] = 1
    assert codec.decode(msgpack.packb(tree), kind, limit=LIMIT) == message


# --- secrets


def carriers() -> list[msgspec.Struct]:
    """Everything that carries a handle or a token, and everything around it."""
    grant = m.RegionGrant(
        region=SECRET.hex()[:32], kind="cuda_ipc", device="cpu", nbytes=1, handle=SECRET
    )
    spec = {"fingerprint": "file:" + "0" * 64, "role": "vae", "label": "x", "tensors": []}
    fill = m.Fill(grant=grant)
    attached = m.Attached(lease="0" * 32, grant=grant, component=m.Component(**spec))
    task = m.ProbeTask(task=1, grant=grant, offset=0, length=1)
    opened = m.OpenedRegion(grant=grant, component=m.Component(**spec))
    return [
        grant,
        fill,
        attached,
        task,
        opened,
        *(m.Answer(1, body) for body in (fill, attached, task)),
        m.Answer(1, m.OpenTask(task=1, regions=[opened])),
        m.Welcome(session="s1", token=SECRET[:32], boot_id="b", daemon="1", devices=[]),
        m.Request(SECRET[:32], 1, m.Ping()),
        m.BulkRequest(SECRET[:32], 1, m.Echo()),
        k.Exported(SECRET, False),
        k.KeeperAnswer(1, k.Exported(SECRET, False)),
    ]


@pytest.mark.parametrize("message", carriers(), ids=lambda message: type(message).__name__)
def test_no_handle_and_no_token_in_any_repr(message: msgspec.Struct) -> None:
    for text in (repr(message), str(message), f"{message}", repr([message])):
        assert "secret" not in text
        assert SECRET.hex()[:16] not in text


def test_every_type_with_raw_bytes_is_looked_at_above() -> None:
    # Bytes that are no secret: what a probe reads and writes, and digests, which count for the
    # session that sent the bytes and for no other.
    harmless = {m.Probe, m.Probed, m.ProbeTask, m.TensorPart, k.WriteRegion, k.RegionBytes}
    looked_at = {type(message) for message in carriers()}
    for kind in UNIONS:
        for cls in walk_structs(msgspec.inspect.type_info(kind), 0)[0]:
            info = msgspec.inspect.type_info(cls)
            raw = any(_is_bytes(field.type) for field in info.fields)
            assert not raw or cls in looked_at | harmless, f"{cls.__name__} may show a secret"


def _is_bytes(info: Any) -> bool:
    if isinstance(info, msgspec.inspect.UnionType):
        return any(_is_bytes(one) for one in info.types)
    return isinstance(getattr(info, "type", info), msgspec.inspect.BytesType)


def walk_structs(info: Any, depth: int) -> tuple[set[type], int]:
    """The structures in a type, and how deep containers lie in containers."""
    match info:
        case msgspec.inspect.Metadata(type=inner):
            return walk_structs(inner, depth)
        case msgspec.inspect.UnionType(types=types):
            below = [walk_structs(one, depth) for one in types]
        case msgspec.inspect.ListType(item_type=item):
            below = [walk_structs(item, depth + 1)]
        case msgspec.inspect.DictType(key_type=key, value_type=value):
            below = [walk_structs(one, depth + 1) for one in (key, value)]
        case msgspec.inspect.TupleType(item_types=items):
            below = [walk_structs(one, depth + 1) for one in items]
        case msgspec.inspect.StructType(cls=cls, fields=fields):
            below = [({cls}, depth + 1), *(walk_structs(f.type, depth + 1) for f in fields)]
        case _:
            return set(), depth
    return set().union(*(found for found, _ in below)), max(deep for _, deep in below)


@pytest.mark.parametrize("kind", UNIONS, ids=lambda kind: getattr(kind, "__name__", "stream"))
def test_declared_types_are_no_deeper_than_the_limit(kind: Any) -> None:
    found, depth = walk_structs(msgspec.inspect.type_info(kind), 0)
    assert found
    assert depth <= limits.NESTING
