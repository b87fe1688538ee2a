"""A route that tells what ComfyUI does not: when ``/free`` is done, which models are loaded."""

from __future__ import annotations

from collections import Counter
from typing import Any

import comfy.model_management
import execution
from aiohttp import web
from server import PromptServer

_done: Counter[str] = Counter(unloads=0, resets=0)


def count() -> None:
    """From here on, unloading and forgetting are counted."""
    management, executor = comfy.model_management, execution.PromptExecutor
    management.unload_all_models = _counting(management.unload_all_models, "unloads")
    executor.reset = _counting(executor.reset, "resets")


def _counting(original: Any, name: str) -> Any:
    def count_too(*arguments: Any, **others: Any) -> Any:
        try:
            return original(*arguments, **others)
        finally:
            _done[name] += 1

    return count_too


@PromptServer.instance.routes.get("/test_shim/state")
async def tell(request: web.Request) -> web.Response:
    models = [each.model for each in comfy.model_management.current_loaded_models]
    names = [type(model.model).__name__ for model in models if model is not None]
    return web.json_response({**_done, "loaded_models": names})
