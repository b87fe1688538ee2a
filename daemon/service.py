"""What a daemon does because it is a service: tells its state, reloads, serves metrics."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from ..protocol import messages as m
from ..protocol.health.verdict import find_failures
from .broker.broker import Broker
from .broker.log import log
from .config import RELOADABLE, ConfigError, Loaded
from .log_output import set_level
from .notify import Notifier
from .settings import SettingsError

if TYPE_CHECKING:
    from .metrics import MetricsServer

LoadConfig = Callable[[], Loaded]

_TELL_SECONDS = 1.0
_HANG_UP_SECONDS = 0.2


class Service:
    """Runs beside a broker, on its event loop, from :meth:`open` to :meth:`close`."""

    def __init__(
        self, broker: Broker, loaded: Loaded, load: LoadConfig, notifier: Notifier
    ) -> None:
        self._broker = broker
        self._loaded = loaded
        self._load = load
        self._notifier = notifier
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._metrics: MetricsServer | None = None
        self._had_terminal = _has_terminal()

    async def open(self) -> None:
        """Before the broker starts: take the address of the metrics. Raises ConfigError."""
        if (address := self._loaded.config.metrics_address) is not None:
            from .metrics import MetricsServer  # takes longer than the rest of the start

            self._metrics = MetricsServer(self._broker)
            try:
                await self._metrics.open(address)
            except OSError as error:
                where = self._loaded.sources["metrics"]
                raise ConfigError(f"{where} = {address}: cannot serve there: {error}") from None

    async def start(self) -> None:
        """The broker has started: serve metrics, if they are wanted, and begin to tell."""
        if self._metrics is not None:
            await self._metrics.serve()
            log("metrics-served", address=str(self._loaded.config.metrics_address))
        self._notifier.start_watchdog()
        self._tell()

    def close(self) -> None:
        """Stop telling."""
        if self._timer is not None:
            self._timer.cancel()
        if self._metrics is not None:
            self._metrics.close()

    # --- reload

    def hung_up(self, stop: asyncio.Event) -> None:
        """SIGHUP: somebody asks for a reload, or the terminal is gone."""

        def decide() -> None:
            if self._had_terminal and not _has_terminal():
                stop.set()
            else:
                self.reload()

        # The signal may come before the kernel has taken the terminal away.
        self._loop.call_later(_HANG_UP_SECONDS if self._had_terminal else 0, decide)

    def reload(self) -> None:
        """Read the configuration again and apply what can be; the log says what cannot.

        One with an error changes nothing.
        """
        self._notifier.reloading()
        try:
            self._reload()
        finally:
            self._notifier.ready()

    def _reload(self) -> None:
        try:
            loaded = self._load()
            before, after = self._loaded.values(), loaded.values()
            changed = [key for key in after if after[key] != before[key]]
            settings = replace(
                self._broker.settings,
                budget=loaded.config.budget,
                reserve=loaded.config.reserve,
                idle_seconds=loaded.config.idle,
            )
        except SettingsError as error:
            log("reload-refused", "error", error=str(error))
        else:
            set_level(loaded.config.log_level)
            self._broker.reconfigure(settings)
            kept = {key: before[key] for key in changed if key not in RELOADABLE}
            self._loaded = loaded.keeping(kept)
            log(
                "reloaded",
                "warning" if kept else "info",
                applied=",".join(key for key in changed if key in RELOADABLE) or "nothing",
                needs_restart=",".join(kept) or "nothing",
            )

    # --- the service manager's line

    def _tell(self) -> None:
        self._timer = self._loop.call_later(_TELL_SECONDS, self._tell)
        self._notifier.status(describe(self._broker.status()))


def describe(status: m.Status) -> str:
    """The state in one line, what is wrong first."""
    wrong = [
        f"{f.where} failed: {f.error}" if f.of == "device" else f"ranks given up: {f.error}"
        for f in find_failures(status)
    ]
    if status.no_gpu:
        wrong.append(f"no GPU is served: {status.no_gpu}")
    group = status.group
    components = status.components
    filling = [c for c in components if c.state == "filling" and c.filled]
    words = [
        *wrong,
        *(f"loading {c.label} {c.filled * 100 // c.nbytes} %" for c in filling[:3]),
        _count(len(status.devices), "device"),
        f"{_count(len(components), 'component')} ({sum(c.nbytes for c in components) >> 20} MiB)",
        _count(len(status.sessions), "session"),
    ]
    if group is not None:
        ready = sum(rank.state == "ready" for rank in status.ranks)
        words.append(f"{ready} of {len(status.ranks)} ranks ready, {_count(group.jobs, 'job')}")
    return "; ".join(words)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _has_terminal() -> bool:
    """Whether this process has a controlling terminal."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True
