"""One configuration from a file, the environment and flags: which wins, and what an error says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import pytest
from daemon_process import running_daemon
from xdit_sidecar.daemon import config as config_module
from xdit_sidecar.daemon.commands.app import run
from xdit_sidecar.daemon.config import (
    KEYS,
    Config,
    ConfigError,
    find_file,
    load_config,
    make_settings,
    misspelt_variables,
    variable_of,
)
from xdit_sidecar.daemon.devices import Chosen
from xdit_sidecar.daemon.unit_files import read_template
from xdit_sidecar.protocol import limits

# key → (text for file, environment and flag; what they come to)
VALUES = {
    "device": (('"cpu"', "cuda", "auto"), ("cpu", "cuda", "auto")),
    "ranks": (('"auto"', "0", "auto"), ("auto", 0, "auto")),
    "compile": (('"on"', "off", "auto"), ("on", "off", "auto")),
    "deadline": (("30", "31.5", "32"), (30.0, 31.5, 32.0)),
    "budget": (('"1GiB"', "2g", "3000000000"), (1 << 30, 2 << 30, 3_000_000_000)),
    "reserve": (("1000", "2M", "0"), (1000, 2 << 20, 0)),
    "idle": (("1", "2", "0"), (1.0, 2.0, 0.0)),
    "trust-uid": (("[1, 2]", "3,4", ["5", "6"]), ([1, 2], [3, 4], [5, 6])),
    "runtime-dir": (('"/tmp/a"', "/tmp/b", "/tmp/c"), ("/tmp/a", "/tmp/b", "/tmp/c")),
    "log-level": (('"debug"', "warning", "error"), ("debug", "warning", "error")),
    "metrics": (
        ('"unix:/tmp/a"', "127.0.0.1:9000", "[::1]:9001"),
        ("unix:/tmp/a", "127.0.0.1:9000", "[::1]:9001"),
    ),
}


def test_every_key_is_tested() -> None:
    assert set(VALUES) == set(KEYS)


@pytest.mark.parametrize("key", KEYS)
def test_the_later_source_is_the_stronger(key: str, tmp_path: Path) -> None:
    (in_file, in_environment, as_flag), expected = VALUES[key]
    file = tmp_path / "config.toml"
    file.write_text(f"{key} = {in_file}\n")
    variable, default = variable_of(key), load_config(environ={"HOME": str(tmp_path)})
    assert default.sources[key] == "default"
    loaded = [
        load_config(file=file, environ={}),
        load_config(file=file, environ={variable: str(in_environment)}),
        load_config({key: as_flag}, file=file, environ={variable: str(in_environment)}),
    ]
    assert [found.values()[key] for found in loaded] == list(expected)
    assert [found.sources[key] for found in loaded] == [f"{key} in {file}", variable, f"--{key}"]
    # And nothing else is touched.
    for found in loaded:
        others = {name: value for name, value in found.values().items() if name != key}
        assert others.items() <= default.values().items()


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("ranks = -1", ["ranks in ", "-1", "auto or a number from 0 to 64"]),
        ("ranks = 65", ["ranks in ", "auto or a number from 0 to 64"]),
        ("ranks = true", ["ranks in ", "auto or a number"]),
        ('ranks = "2"', ["ranks in ", "auto or a number"]),
        ("deadline = 0.5", ["deadline in ", ">= 1"]),
        ("deadline = nan", ["deadline in ", ">= 1"]),
        ('budget = "1K"', ["budget in ", str(limits.REGION_GRANULE)]),
        ('reserve = "many"', ["reserve in ", "512M or 6GiB"]),
        ("trust-uid = [1, -2]", ["trust-uid in ", "[1, -2]", ">= 0"]),
        ('trust-uid = "me"', ["trust-uid in ", "array"]),
        ('log-level = "loud"', ["log-level in ", "debug, info, warning, error"]),
        ('metrics = "0.0.0.0:9000"', ["metrics in ", "no", "loopback"]),
        ('metrics = "example.org:9000"', ["metrics in ", "127.0.0.1:PORT"]),
        ('metrics = "127.0.0.1:0"', ["metrics in ", "port"]),
        ('metrics = "unix:metrics.sock"', ["metrics in ", "absolute"]),
        ('device = ""', ["device in ", "empty"]),
        ("rank = 1", ["rank in ", "did you mean ranks?"]),
        ("[daemon]\nranks = 1", ["daemon in ", "no such setting"]),
        ("ranks =\nidle = 1", ["TOML", "line 1"]),
    ],
)
def test_an_error_names_the_key_and_the_file(text: str, names: list[str], tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(file=file, environ={})
    for name in [*names, str(file)]:
        assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "environ", "name"),
    [
        ({"ranks": "x"}, {}, "--ranks = x"),
        ({"trust-uid": ["1", "you"]}, {}, "--trust-uid"),
        ({}, {"XDIT_SIDECAR_RANKS": "x"}, "XDIT_SIDECAR_RANKS = x"),
        ({}, {"XDIT_SIDECAR_IDLE": "-1"}, "XDIT_SIDECAR_IDLE = -1"),
    ],
)
def test_an_error_names_the_variable_or_flag(
    flags: dict[str, str], environ: dict[str, str], name: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=name):
        load_config(flags, environ={"HOME": str(tmp_path), **environ})


@pytest.mark.parametrize(
    ("devices", "ranks", "expected"),
    [
        (("cpu",), "auto", 1),
        (("GPU-0", "cpu"), "auto", 1),
        (("GPU-0", "GPU-1", "cpu"), "auto", 2),
        ((*(f"GPU-{number}" for number in range(70)), "cpu"), "auto", limits.RANKS),
        (("GPU-0", "GPU-1", "cpu"), 0, 0),
        (("GPU-0", "cpu"), 3, 3),
    ],
)
def test_how_many_ranks_there_are(
    devices: tuple[str, ...],
    ranks: Literal["auto"] | int,
    expected: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(config_module, "choose_devices", lambda wanted: Chosen(devices))
    config = Config(ranks=ranks, runtime_dir=str(tmp_path))
    assert make_settings(config).ranks == expected


def test_which_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system, home = tmp_path / "etc.toml", tmp_path / "home"
    monkeypatch.setattr("xdit_sidecar.daemon.config.SYSTEM_FILE", system)
    own = home / ".config/xdit-sidecar/config.toml"
    environ = {"HOME": str(home)}
    assert find_file(None, environ) is None
    system.write_text("ranks = 1")
    assert find_file(None, environ) == system
    own.parent.mkdir(parents=True)
    own.write_text("ranks = 2")
    assert find_file(None, environ) == own
    assert find_file(None, {**environ, "XDG_CONFIG_HOME": str(tmp_path)}) == system
    named = {**environ, "XDIT_SIDECAR_CONFIG": "/elsewhere"}
    assert find_file(None, named) == Path("/elsewhere")
    assert find_file("/here", named) == Path("/here")
    with pytest.raises(ConfigError, match=r"/elsewhere: No such file"):
        load_config(environ=named)


def test_a_misspelt_variable_is_told() -> None:
    environ = {
        "XDIT_SIDECAR_TRUST_UIDS": "1",
        "XDIT_SIDECAR_LIBCUDA": "x",
        "XDIT_SIDECAR_RANKS": "",
    }
    (text,) = misspelt_variables(environ)
    assert text == "XDIT_SIDECAR_TRUST_UIDS is no setting; did you mean XDIT_SIDECAR_TRUST_UID?"


def test_the_example_is_what_it_says(tmp_path: Path) -> None:
    example = read_template("config.example.toml")
    file = tmp_path / "config.toml"
    file.write_text(example)
    assert load_config(file=file, environ={}).values() == load_config(environ={}).values()
    commented = [line for line in example.splitlines() if line[:1] == "#" and line[1:2].isalpha()]
    assert {line[1:].split(" = ")[0] for line in commented} == set(KEYS)
    file.write_text("\n".join(line[1:] for line in commented))
    load_config(file=file, environ={})


def test_the_config_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.toml"
    file.write_text('reserve = "1GiB"\n')
    monkeypatch.setenv("XDIT_SIDECAR_CONFIG", str(file))
    monkeypatch.setenv("XDIT_SIDECAR_IDLE", "90")
    assert run(["config"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(
        line.split() == ["reserve", "1", "GiB", "reserve", "in", str(file)] for line in lines
    )
    assert any(line.split() == ["idle", "90", "XDIT_SIDECAR_IDLE"] for line in lines)
    assert run(["config", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["file"] == str(file)
    assert told["settings"]["reserve"]["value"] == 1 << 30
    assert told["settings"]["ranks"]["reloadable"] is False
    assert run(["config", "--example"]) == 0
    assert capsys.readouterr().out == read_template("config.example.toml")
    file.write_text("reserv = 1")
    assert run(["config"]) == 2
    assert "did you mean reserve?" in capsys.readouterr().err


def test_a_daemon_runs_with_all_three(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text('budget = "64MiB"\nranks = 3\nlog-level = "debug"\n')
    environment = {"XDIT_SIDECAR_RANKS": "2", "XDIT_SIDECAR_BUDGET": "32MiB"}
    options = ("--ranks", "0", "--config", str(file))
    with running_daemon(tmp_path, *options, environment=environment) as daemon:
        with daemon.client() as client:
            status = client.status()
        assert status.devices[0].budget == 32 << 20
        assert status.ranks == []
        daemon.wait_for_log("DEBUG request-ended session=")
        assert f'configuration="{file}"' in daemon.wait_for_log("serving")
