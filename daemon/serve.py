"""Running a broker until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import fcntl
import gc
import os
import resource
import signal
import stat
from collections.abc import Iterator

import zmq

from ..protocol.endpoints import Endpoints, RuntimeDirError, why_not_private
from ..protocol.errors import SidecarError
from .broker.broker import Broker
from .broker.log import log
from .config import Loaded, make_settings, misspelt_variables
from .devices import NoDevice
from .log_output import set_up_log
from .notify import Notifier
from .service import LoadConfig, Service
from .settings import Settings, SettingsError

_OUR_MODES = (0o700, 0o711)


@contextlib.contextmanager
def exclusive_runtime_dir(endpoints: Endpoints, *, shared: bool) -> Iterator[None]:
    """Make the runtime directory ours alone for the length of the block.

    Raises RuntimeDirError when it belongs to someone else, is open to others, or another daemon
    serves it.
    """
    directory, mode = endpoints.directory, 0o711 if shared else 0o700
    try:
        directory.mkdir(mode=mode, parents=True, exist_ok=True)
        found = directory.stat()
        if found.st_uid == os.geteuid() and stat.S_IMODE(found.st_mode) in _OUR_MODES:
            directory.chmod(mode)  # ours from an earlier start, perhaps for other accounts
        if (problem := why_not_private(directory, owner=os.geteuid(), loosest=mode)) is not None:
            raise RuntimeDirError(
                f"{problem}: others could stand between the daemon and its clients; "
                f"`chmod {mode:o}` it or choose another with --runtime-dir"
            )
        lock = _take_lock(endpoints)
    except OSError as error:
        raise RuntimeDirError(f"cannot use {directory} as runtime directory: {error}") from None
    try:
        with contextlib.suppress(OSError):  # only for people who look; the lock itself is held
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        # Removed while still locked; a daemon that waits for nothing finds a new one.
        endpoints.lock.unlink(missing_ok=True)
        os.close(lock)


def _take_lock(endpoints: Endpoints) -> int:
    """A descriptor of the locked lock file. Raises RuntimeDirError while a daemon holds it."""
    while True:
        lock = os.open(endpoints.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The daemon before us may have removed this file after we opened it.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock), os.stat(endpoints.lock)):
                    return lock
        except BlockingIOError:
            holder = os.pread(lock, 32, 0).decode(errors="replace").strip()
            os.close(lock)
            raise RuntimeDirError(
                f"a daemon (pid {holder}) serves {endpoints.directory} already: use it, stop it, "
                "or choose another directory with --runtime-dir"
            ) from None
        except OSError:
            os.close(lock)
            raise
        os.close(lock)


async def _run(settings: Settings, loaded: Loaded, load: LoadConfig, notifier: Notifier) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    broker = Broker(settings)
    service = Service(broker, loaded, load, notifier)
    loop.add_signal_handler(signal.SIGHUP, service.hung_up, stop)
    try:
        await service.open()
        try:
            broker.start()
        except (OSError, zmq.ZMQError) as error:
            raise RuntimeDirError(
                f"cannot serve in {settings.endpoints.directory}: {error}; see to it that there "
                "is room and that nothing else lies there, or choose another with --runtime-dir"
            ) from None
        await service.start()
        log(
            "serving",
            directory=str(settings.endpoints.directory),
            devices=",".join(settings.devices),
            ranks=settings.ranks,
            pid=os.getpid(),
            configuration=loaded.file or "none",
        )
        notifier.ready()
        await stop.wait()
        log("stopping")
        notifier.stopping()
    finally:
        service.close()
        broker.close()


def serve(load: LoadConfig) -> None:
    """Serve until SIGTERM or SIGINT; afterwards nothing of it remains.

    ``load`` gives the configuration, now and at each reload. Raises SettingsError, NoDevice and
    RuntimeDirError.
    """
    notifier = Notifier.from_environment()
    try:
        loaded = load()
        set_up_log(loaded.config.log_level)
        # What a watchdog or a crash interrupts is then in the log, if that is a file.
        with contextlib.suppress(OSError):
            faulthandler.enable()
        for text in misspelt_variables():
            log("setting-ignored", "warning", reason=text)
        notifier.status("starting: looking for devices")
        settings = make_settings(loaded.config)
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        gc.freeze()
        with exclusive_runtime_dir(settings.endpoints, shared=settings.shared):
            asyncio.run(_run(settings, loaded, load, notifier))
    except (SettingsError, NoDevice, SidecarError) as error:
        notifier.status(f"failed: {error}")
        raise
    finally:
        notifier.close()
