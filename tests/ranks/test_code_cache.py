"""Where ranks keep compiled code, for accounts of every kind."""

from __future__ import annotations

import pathlib
from pathlib import Path

import pytest
from xdit_sidecar.daemon.ranks import fork_server
from xdit_sidecar.daemon.ranks.code_cache import code_cache, prepare_code_cache

VARIABLES = ("CACHE_DIRECTORY", "XDG_CACHE_HOME", "HOME", "TORCHINDUCTOR_CACHE_DIR")


@pytest.fixture(autouse=True)
def _bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def homeless(*_: object) -> Path:
    raise RuntimeError("Could not determine home directory.")  # pathlib's own words


def test_in_the_service_s_or_the_account_s_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert code_cache() == Path("/home/somebody/.cache/xdit-sidecar/torchinductor")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert code_cache() == Path("/caches/xdit-sidecar/torchinductor")
    monkeypatch.setenv("CACHE_DIRECTORY", "/var/cache/xdit-sidecar:/var/cache/other")
    assert code_cache() == Path("/var/cache/xdit-sidecar/torchinductor")


def test_an_account_without_a_home_keeps_no_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pathlib.Path, "home", homeless)
    assert code_cache() is None
    assert "has no home directory; set XDG_CACHE_HOME" in str(prepare_code_cache())


def test_a_rank_of_an_account_without_a_home_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes as far as the channel, on which it could say why it does not start."""
    monkeypatch.setattr(pathlib.Path, "home", homeless)
    monkeypatch.setattr(fork_server, "die_with_parent", lambda parent: None)
    monkeypatch.setattr(fork_server.signal, "signal", lambda number, action: None)
    monkeypatch.setattr(fork_server.faulthandler, "register", lambda number: None)
    monkeypatch.setattr(fork_server.os, "environ", {})

    class Reached(Exception):
        pass

    def channel(descriptor: int) -> None:
        raise Reached

    monkeypatch.setattr(fork_server, "Channel", channel)
    options = {
        **{"world-size": "1", "backend": "gloo", "meeting-file": "/meeting", "deadline": "1"},
        **{"runtime-dir": "/run", "channel": "9", "parent": "1"},
    }
    arguments = [word for name, value in options.items() for word in (f"--{name}", value)]
    monkeypatch.setattr(fork_server.sys, "argv", ["ranks", *arguments])
    with pytest.raises(Reached):
        fork_server.main()
    assert "TORCHINDUCTOR_CACHE_DIR" not in fork_server.os.environ
