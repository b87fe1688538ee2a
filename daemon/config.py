"""Configuration: one TOML file, then the environment, then flags, the later the stronger.

A key has one name everywhere: ``trust-uid`` in the file, ``XDIT_SIDECAR_TRUST_UID`` in the
environment, ``--trust-uid`` on the command line.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import msgspec
from msgspec import Meta

from ..protocol import limits
from ..protocol.endpoints import SYSTEM_DIRECTORY, resolve_runtime_dir
from .devices import choose_devices
from .metrics_address import MetricsAddress, parse_metrics_address
from .settings import Settings, SettingsError

PREFIX = "XDIT_SIDECAR_"
FILE_VARIABLE = PREFIX + "CONFIG"
SYSTEM_FILE = Path("/etc/xdit-sidecar/config.toml")

SIZES = frozenset({"budget", "reserve"})
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_LARGEST_FILE = 1 << 20  # bytes
_MOST = 1 << 62  # more than any device has; "all of it" may be written so

Size = Annotated[int, Meta(ge=0, le=_MOST)]
Uid = Annotated[int, Meta(ge=0, le=2**32 - 2)]


class ConfigError(SettingsError):
    """A value cannot be used; the text names its key and where it came from."""


class Config(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """Everything that can be configured, with its default. Sizes in bytes, times in seconds."""

    device: str = "auto"
    ranks: Annotated[int, Meta(ge=0, le=limits.RANKS)] | Literal["auto"] = "auto"
    compiles: Literal["auto", "on", "off"] = msgspec.field(name="compile", default="auto")
    deadline: Annotated[float, Meta(ge=1, le=86400)] = 60.0
    budget: Annotated[int, Meta(ge=limits.REGION_GRANULE, le=_MOST)] | None = None
    reserve: Size = 512 * limits.MIB
    idle: Annotated[float, Meta(ge=0)] = 0.0
    trust_uid: list[Uid] = []
    runtime_dir: str | None = None
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    metrics: str | None = None

    @property
    def metrics_address(self) -> MetricsAddress | None:
        """Where metrics are served, or None."""
        return parse_metrics_address(self.metrics) if self.metrics else None


# What a reload (SIGHUP) applies to a daemon that runs; everything else needs a restart.
RELOADABLE = frozenset({"budget", "reserve", "idle", "log-level"})

_FIELDS = {field.encode_name: field for field in msgspec.structs.fields(Config)}
KEYS = tuple(_FIELDS)


class Loaded(msgspec.Struct, frozen=True):
    """A configuration, and for each key where its value came from."""

    config: Config
    sources: dict[str, str]
    file: str | None  # that was read

    def values(self) -> dict[str, Any]:
        """Key → value."""
        return {key: getattr(self.config, _FIELDS[key].name) for key in KEYS}

    def keeping(self, values: Mapping[str, Any]) -> Loaded:
        """The same with some values (key → value) as they were: what runs, after a reload."""
        kept = {_FIELDS[key].name: value for key, value in values.items()}
        return Loaded(msgspec.structs.replace(self.config, **kept), self.sources, self.file)


def parse_size(text: str) -> int:
    """Bytes of "512M", "6GiB" or a plain number. Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", text.strip().lower())
    if match is None:
        raise ValueError(f"{text!r} is no size; write for example 512M or 6GiB")
    return int(float(match[1]) * _UNITS[match[2]])


def find_file(
    given: str | os.PathLike[str] | None, environ: Mapping[str, str], *, of_host: bool = True
) -> Path | None:
    """The one file that is read: ``given``, ``$XDIT_SIDECAR_CONFIG``, the account's, the host's.

    The first two must exist (reading them fails otherwise); the others may. The host's is for the
    host's daemon: whom that one trusts, an account's own need not.
    """
    if named := given or environ.get(FILE_VARIABLE):
        return Path(named)
    home = environ.get("XDG_CONFIG_HOME") or os.path.join(environ.get("HOME") or "/", ".config")
    own = Path(home, "xdit-sidecar", "config.toml")
    for path in (own, SYSTEM_FILE) if of_host else (own,):
        if os.path.lexists(path):
            return path
    return None


def load_config(
    flags: Mapping[str, str | list[str] | None] | None = None,
    *,
    file: str | os.PathLike[str] | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Loaded:
    """The effective configuration. ``flags``: key → text as given, None where it was not.

    Raises ConfigError.
    """
    directory = (flags or {}).get("runtime-dir")
    of_host = os.geteuid() == 0 or directory == SYSTEM_DIRECTORY
    path = find_file(file, environ, of_host=of_host)
    values: dict[str, Any] = {}
    sources = dict.fromkeys(KEYS, "default")

    def put(key: str, source: str, value: object, *, text: bool) -> None:
        values[_FIELDS[key].name] = _convert(key, source, value, text=text)
        sources[key] = source

    for key, value in (_read(path) if path is not None else {}).items():
        if key not in _FIELDS:
            raise ConfigError(f"{key} in {path}: there is no such setting{_suggest(key, KEYS)}")
        put(key, f"{key} in {path}", value, text=False)
    for key in KEYS:
        if given := environ.get(variable_of(key)):
            put(key, variable_of(key), given, text=True)
    for key, flag in (flags or {}).items():
        if flag is not None:
            put(key, f"--{key}", flag, text=True)
    return Loaded(Config(**values), sources, str(path) if path is not None else None)


def variable_of(key: str) -> str:
    """The environment variable of a key."""
    return PREFIX + key.upper().replace("-", "_")


def misspelt_variables(environ: Mapping[str, str] = os.environ) -> list[str]:
    """One sentence for each variable that looks like a setting and is none."""
    known = [*map(variable_of, KEYS), FILE_VARIABLE]
    return [
        f"{name} is no setting{hint}"
        for name in sorted(environ)
        if name.startswith(PREFIX) and name not in known and (hint := _suggest(name, known))
    ]


def make_settings(config: Config) -> Settings:
    """What the daemon runs with. Looks for devices. Raises SettingsError, NoDevice…"""
    directory = config.runtime_dir
    chosen = choose_devices(config.device)
    gpus = len(chosen.devices) - 1  # host memory is one of them
    ranks = min(max(gpus, 1), limits.RANKS) if config.ranks == "auto" else config.ranks
    return Settings(
        endpoints=resolve_runtime_dir(os.path.expanduser(directory) if directory else None),
        devices=chosen.devices,
        no_gpu=chosen.no_gpu,
        ranks=ranks,
        compiles=config.compiles,
        deadline=config.deadline,
        budget=config.budget,
        reserve=config.reserve,
        idle_seconds=config.idle,
        trusted_uids=frozenset(config.trust_uid),
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise ConfigError(f"{path} is larger than {_LARGEST_FILE} bytes: no configuration")
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None


def _convert(key: str, source: str, value: object, *, text: bool) -> object:
    """A value of the key's type. Raises ConfigError."""
    field = _FIELDS[key]
    try:
        if key in SIZES and isinstance(value, str):
            value = parse_size(value)
        elif text and key == "trust-uid":
            given = value if isinstance(value, list) else str(value).split(",")
            value = [word.strip() for word in given]
        converted = msgspec.convert(value, field.type, strict=not text)
        if key == "metrics" and converted:
            parse_metrics_address(str(converted))
        if key in ("runtime-dir", "device") and not converted:
            raise ValueError("is empty")
    except (msgspec.ValidationError, ValueError, OverflowError) as error:
        reason = str(error).replace("`", "").replace(" - at $", ", in the element $")
        if choices := get_args(field.type) if get_origin(field.type) is Literal else ():
            reason = f"choose from {', '.join(choices)}"
        elif key == "ranks":
            reason = f"write auto or a number from 0 to {limits.RANKS}"
        raise ConfigError(f"{source} = {_show(value)}: {reason}") from None
    return converted


def _show(value: object) -> str:
    return str(value) if isinstance(value, str | int | float | list) else type(value).__name__


def _suggest(word: str, known: tuple[str, ...] | list[str]) -> str:
    close = difflib.get_close_matches(word, known, 1, 0.85 if word.startswith(PREFIX) else 0.6)
    return f"; did you mean {close[0]}?" if close else ""
