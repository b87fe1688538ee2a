"""The status panel's routes in ComfyUI's web server.

``GET /xdit/status`` answers a :class:`.panel_report.Report`, or a Problem with status 503.
``POST /xdit/health-check`` runs the health-check in this process and answers its rows.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import msgspec
from aiohttp import web

from ..protocol.client.deadline import Deadline, ShouldCancel
from ..protocol.errors import SidecarError
from ..protocol.health.check import HealthReport
from ..protocol.health.runner import run_checks
from .link import WHAT_TO_DO, comfy_version, has_dynamic_vram, link
from .panel_report import Problem, Report, make_report

STATUS = "/xdit/status"
HEALTH_CHECK = "/xdit/health-check"
# A page of another site cannot send it: ComfyUI allows no such header across origins, not even
# with --enable-cors-header.
REQUIRED_HEADER = "X-XDiT-Panel"

_STATUS_SECONDS = 3.0
_CHECK_SECONDS = 20.0

_ELSE_TO_DO = "See the daemon's log, then restart it."

_FOREIGN = Problem(
    code="cross-site",
    problem="The panel's questions are only answered to ComfyUI's own page.",
    what_to_do=f"Send the header {REQUIRED_HEADER}, from the same origin.",
)


class PanelRoutes:
    """Asks the daemon in threads, so that ComfyUI's event loop never waits for it."""

    def __init__(self) -> None:
        # One for the status, one for the health-check.
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="xdit-panel")
        self._asked: asyncio.Future[Report | Problem] | None = None
        self._checking = threading.Lock()

    def add_to(self, routes: web.RouteTableDef) -> None:
        """Register them."""
        routes.get(STATUS)(self.status)
        routes.post(HEALTH_CHECK)(self.health_check)

    async def status(self, request: web.Request) -> web.Response:
        """Who asks while a question is under way gets the same answer."""
        if not _is_from_panel(request):
            return _json(_FOREIGN, 403)
        if self._asked is None or self._asked.done():
            loop = asyncio.get_running_loop()
            self._asked = loop.run_in_executor(self._threads, ask_status, _until_stopped(loop))
        answer = await asyncio.shield(self._asked)
        return _json(answer, 503 if isinstance(answer, Problem) else 200)

    async def health_check(self, request: web.Request) -> web.Response:
        """The checks' rows, also where the daemon is absent: that is one of them."""
        if not _is_from_panel(request):
            return _json(_FOREIGN, 403)
        if not self._checking.acquire(blocking=False):
            return _json(
                Problem(
                    code="check-runs",
                    problem="A health-check is already running.",
                    what_to_do=f"Wait for it: it takes {_CHECK_SECONDS:g} seconds at most.",
                ),
                409,
            )
        loop = asyncio.get_running_loop()
        # The thread lets go: a request that is cancelled does not end its check.
        check = loop.run_in_executor(self._threads, self._check, _until_stopped(loop))
        answer = await asyncio.shield(check)
        if isinstance(answer, Problem):
            return _json(answer, 503)
        return web.json_response(text=answer.to_json())

    def _check(self, should_cancel: ShouldCancel) -> HealthReport | Problem:
        try:
            return run_checks(
                timeout=_CHECK_SECONDS,
                host=f"ComfyUI {comfy_version()}",
                dynamic_vram=has_dynamic_vram(),
                should_cancel=should_cancel,
            )
        except SidecarError as error:
            return _describe(error)
        finally:
            self._checking.release()


def register_panel() -> None:
    """Add the routes to the running ComfyUI's server; nothing where there is none."""
    import server

    instance = getattr(server.PromptServer, "instance", None)
    if instance is not None:
        PanelRoutes().add_to(instance.routes)


def ask_status(should_cancel: ShouldCancel | None = None) -> Report | Problem:
    """The daemon's report, or why there is none. Blocks for 3 s at most."""
    deadline = Deadline(_STATUS_SECONDS, should_cancel)
    try:
        client = link().client
        status = client.status(timeout=deadline.remaining, should_cancel=should_cancel)
        return make_report(status, client.session(deadline).welcome.session)
    except SidecarError as error:
        return _describe(error)


def _describe(error: SidecarError) -> Problem:
    return Problem(
        code=error.code,
        problem=str(error),
        what_to_do=WHAT_TO_DO.get(error.code, _ELSE_TO_DO),
    )


def _until_stopped(loop: asyncio.AbstractEventLoop) -> Callable[[], bool]:
    """Ctrl-C stops ComfyUI's loop; the threads must not keep the process alive then."""
    return lambda: not loop.is_running()


def _is_from_panel(request: web.Request) -> bool:
    # Browsers tell where a request comes from, others do not send it.
    site = request.headers.get("Sec-Fetch-Site", "same-origin")
    return REQUIRED_HEADER in request.headers and site in ("same-origin", "none")


def _json(answer: Report | Problem, status: int) -> web.Response:
    return web.Response(
        body=msgspec.json.encode(answer),
        status=status,
        content_type="application/json",
        headers={"Cache-Control": "no-store"},
    )
