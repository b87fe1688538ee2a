"""The handshake rule."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from xdit_sidecar.protocol.version import (
    PREAMBLE_BYTES,
    PROTOCOL_VERSION,
    NotOurProtocol,
    ProtocolVersion,
    decode_preamble,
    encode_preamble,
    explain_mismatch,
)

numbers = st.integers(0, 0xFFFF)
versions = st.builds(ProtocolVersion, numbers, numbers)


@given(versions)
def test_preambles_come_back(version: ProtocolVersion) -> None:
    assert decode_preamble(encode_preamble(version)) == version
    assert len(encode_preamble(version)) == PREAMBLE_BYTES


def test_the_preamble_never_changes() -> None:
    assert encode_preamble(ProtocolVersion(1, 0)) == b"XDIT\x00\x01\x00\x00"
    assert encode_preamble() == encode_preamble(PROTOCOL_VERSION)


@given(st.binary(max_size=16))
def test_anything_else_is_refused(data: bytes) -> None:
    if data[:4] == b"XDIT" and len(data) == PREAMBLE_BYTES:
        return
    with pytest.raises(NotOurProtocol):
        decode_preamble(data)


@given(versions, versions)
def test_majors_decide_and_the_older_side_is_named(
    daemon: ProtocolVersion, client: ProtocolVersion
) -> None:
    text = explain_mismatch(daemon, client)
    if daemon.major == client.major:
        assert text is None
    else:
        older = "client" if client.major < daemon.major else "daemon"
        assert text is not None
        assert f"the {older} is too old; update the " in text
        assert str(daemon) in text
        assert str(client) in text
