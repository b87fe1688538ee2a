"""docs/protocol.md is what the message types say."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from types import ModuleType
from typing import get_args

import msgspec
import project
import pytest
from xdit_sidecar.protocol import errors, limits, messages

PROGRAM = project.ROOT / "tools/protocol_reference.py"


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    """The generator as a module."""
    spec = importlib.util.spec_from_file_location("protocol_reference", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_committed_file_is_up_to_date() -> None:
    command = [sys.executable, str(PROGRAM), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_file_out_of_date_is_noticed(
    reference: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["protocol_reference.py", "--check"])
    monkeypatch.setattr(limits, "RANKS", limits.RANKS + 1)
    assert reference.main() == 1
    assert "out of date: `make docs`" in capsys.readouterr().err


def test_every_message_limit_and_error_is_in_it(reference: ModuleType) -> None:
    lines = reference.render().splitlines()
    kinds = {
        kind
        for kind in vars(messages).values()
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct)
    } - {messages.Message}
    assert len(kinds) > 40
    for kind in kinds:
        assert lines.count(f"### {kind.__name__}") == 1, kind
    bounds = [name for name in vars(limits) if name.isupper() and name not in ("KIB", "MIB", "GIB")]
    for name in bounds:
        assert sum(line.startswith(f"| `{name}` |") for line in lines) == 1, name
    codes = {
        kind.code
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.SidecarError)
    }
    for code in codes:
        assert sum(line.startswith(f"| `{code}` |") for line in lines) == 1, code


def test_everything_that_is_sent_has_a_sender(reference: ModuleType) -> None:
    sent = {
        kind
        for union in ("RequestBody", "BulkBody", "AnswerBody", "StreamMessage", "Task", "Outcome")
        for kind in get_args(getattr(messages, union))
    } - {type(None)}
    for kind in sent:
        assert all("→" in way for way in reference.directions(kind))
        assert reference.directions(kind), kind


def test_a_message_without_a_docstring_is_refused(reference: ModuleType) -> None:
    class Silent(messages.Message, frozen=True, tag="silent"):
        number: int = 0

    with pytest.raises(reference.Undocumented, match=r"Silent has no docstring"):
        reference.describe_struct(Silent)
