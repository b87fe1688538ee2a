"""This ComfyUI process's one client of the daemon."""

from __future__ import annotations

import atexit
import logging
import threading

import comfy.model_management

from ..protocol.client.attachment import Attachment
from ..protocol.client.client import Client
from ..protocol.client.remote import RemoteRanks
from ..protocol.endpoints import client_places, find_daemon
from ..protocol.errors import RanksUnavailable, SidecarError

_log = logging.getLogger("xdit_sidecar.comfyui")

_QUICK_SECONDS = 0.5  # ComfyUI asks for fingerprints before each prompt

INSTALL_HINT = (
    "The daemon runs beside ComfyUI, in an environment of its own: install it there with "
    "`pip install '.[daemon]'` in a clone of its repository, then start it with "
    "`xdit-sidecar serve`."
)
#: By the codes of errors.
WHAT_TO_DO = {
    "absent": INSTALL_HINT,
    "deadline": "The daemon is busy or hangs: see its log, and restart it if this stays so.",
    "lost": "Wait until the daemon is back, or start it with `xdit-sidecar serve` (its log says "
    "why it ended), then run the prompt again.",
    "not-allowed": "Start a daemon of your own, or have its owner run it with --trust-uid.",
    "runtime-dir": "Set XDIT_SIDECAR_RUNTIME_DIR to the daemon's directory and restart ComfyUI.",
    "version": "Install the same version of xdit-sidecar for ComfyUI and for the daemon, then "
    "restart both.",
}


class Link:
    """Connects when first used; stays for the life of the process."""

    def __init__(self) -> None:
        self.client = Client(
            name="ComfyUI", host=f"ComfyUI {comfy_version()}", dynamic_vram=has_dynamic_vram()
        )
        self.remote = RemoteRanks(self.client)
        self._kept_epoch = ":0"
        atexit.register(self.client.close)

    def boot_id(self) -> str:
        """The daemon's, a new one after each of its starts; "" if none answers. Never raises."""
        try:
            return self.client.ping(timeout=_QUICK_SECONDS)
        except SidecarError:
            return ""

    def epoch(self) -> str:
        """Changes when what was handed over has to be handed over again. Never raises."""
        return f"{self.boot_id()}:{self.client.orphans}"

    def kept_epoch(self) -> str:
        """As `epoch`, but the last known while no daemon answers. Never raises.

        For what goes on to work without one: weights that are mapped stay so.
        """
        if boot_id := self.boot_id():
            self._kept_epoch = f"{boot_id}:{self.client.orphans}"
        return self._kept_epoch

    def rank_devices(self) -> list[str]:
        """Where the ranks work, at least one place. Raises SidecarError."""
        devices = list(dict.fromkeys(rank.device for rank in self.client.status().ranks))
        if not devices:
            raise RanksUnavailable(
                "the daemon has no ranks, so nothing can be computed there: start it again with "
                "`xdit-sidecar serve`, without `--ranks 0`"
            )
        return devices

    def spread(self, attachment: Attachment) -> None:
        """Have a component wherever the ranks work: on their GPUs copied from the one it is on.

        Nobody leases these copies: they stay until there is need of their room. Ranks themselves
        copy what lies in host memory. Raises SidecarError.
        """
        if attachment.device == "cpu":
            return
        for device in self.rank_devices():
            if device not in ("cpu", attachment.device):
                self.client.copy_to(attachment, device, should_cancel=stop_if_interrupted).release()


_lock = threading.Lock()
_link: Link | None = None


def link() -> Link:
    """The process's link."""
    global _link
    with _lock:
        if _link is None:
            _link = Link()
        return _link


def log_whereabouts() -> None:
    """One line when ComfyUI starts: where the daemon is, or how to get one. Waits for nothing."""
    try:
        sockets = find_daemon(client_places())
        found = sockets.session.exists()
    except (SidecarError, OSError) as error:
        _log.warning("xDiT: %s. %s", error, INSTALL_HINT)
        return
    if found:
        _log.info("xDiT: the daemon's sockets are in %s", sockets.directory)
    else:
        _log.warning("xDiT: no daemon in %s yet. %s", sockets.directory, INSTALL_HINT)


def stop_if_interrupted() -> bool:
    """For waits: passes on ComfyUI's own exception when the prompt is interrupted."""
    comfy.model_management.throw_exception_if_processing_interrupted()
    return False


def explain(error: SidecarError) -> str:
    """An error for people at the node, with what to do about it."""
    hint = WHAT_TO_DO.get(error.code)
    return f"{error}. {hint}" if hint else str(error)


def comfy_version() -> str:
    """ComfyUI's own version, or "?"."""
    try:
        from comfyui_version import __version__
    except ImportError:
        return "?"
    return str(__version__)


def has_dynamic_vram() -> bool | None:
    """Whether this ComfyUI pages weights itself; None where there is no such thing yet."""
    import comfy.model_patcher

    patcher = getattr(comfy.model_patcher, "CoreModelPatcher", None)
    return None if patcher is None else "Dynamic" in patcher.__name__
