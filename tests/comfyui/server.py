"""A real ComfyUI server for tests: its main.py in a process of its own, on the loopback interface.

with ComfyServer(tmp_path / "base", packs={"xdit_sidecar": clone()}) as server:
    entry = server.run(workflows.text_to_image(save="first"))
    latent = server.tensors("first")["samples"]
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from comfyui import tiny_checkpoints
from comfyui.listener import Listener
from comfyui_checkout import comfyui
from fork_server import Process, start_python
from safetensors.torch import load_file

HERE = Path(__file__).parent
SHIM = HERE / "shim"
START_SECONDS = 180.0  # imports, on a loaded machine
STOP_SECONDS = 15.0
PROMPT_SECONDS = 60.0
REQUEST_SECONDS = 30.0
LONGEST_PAUSE = 0.05  # each question costs both sides what a step of a tiny model does
ASK_AGAIN_SECONDS = 1.0  # for /free: ComfyUI forgets the wish if it is about to wait for prompts
ATTEMPTS = 3  # at a port; another process may take it between the question and its use
LOG_TAIL = 60  # lines shown when something fails
NO_ANSWER = (OSError, http.client.HTTPException)

Workflow = dict[str, dict[str, Any]]


class WorkflowRefused(AssertionError):
    """The server did not accept the workflow, or not all of its outputs."""


class WorkflowFailed(AssertionError):
    """A node raised; ``exception_type`` and ``node_id`` are those of ComfyUI's report."""

    def __init__(self, text: str, exception_type: str = "", node_id: str = "") -> None:
        super().__init__(text)
        self.exception_type = exception_type
        self.node_id = node_id


class WorkflowInterrupted(WorkflowFailed):
    """Somebody interrupted the workflow while it ran."""


def comfy_environment() -> dict[str, str]:
    """This environment for a ComfyUI."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


class ComfyServer:
    """ComfyUI with a base directory of its own, tiny checkpoints and the test shim.

    ``packs`` are custom node packs, name in custom_nodes/ → folder, linked there. ``arguments`` are
    appended to the command line and ``environment`` is added to this process's. ``front_end`` is a
    folder with the browser's part, by default none. ``cpu=False`` lets it use a GPU. Without the
    ``shim`` stock loaders refuse the tiny checkpoints, and `free`, `loaded_models` and `tensors`
    have nothing to ask. Skips the test where ComfyUI cannot be had.
    """

    def __init__(
        self,
        base: Path,
        *,
        packs: Mapping[str, Path] | None = None,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        front_end: Path | None = None,
        cpu: bool = True,
        shim: bool = True,
    ) -> None:
        self.base = base
        self.log_path = base / "comfyui.log"
        self.port = 0
        self.process: Process | None = None
        self._checkout = comfyui()
        self._kind = "comfyui" if cpu else "comfyui on a GPU"  # which is not forked
        self._front_end = front_end or base / "no-front-end"
        self._packs = {**(packs or {}), **({"test_shim": SHIM} if shim else {})}
        # The attention that it takes by itself on a GPU, and that this project computes.
        as_on_gpu = ["--cpu", "--use-pytorch-cross-attention"]
        self._arguments = [*(as_on_gpu if cpu else []), *arguments]
        self._environment = {**comfy_environment(), **(environment or {})}
        self._prepare()

    def _prepare(self) -> None:
        for name in ("custom_nodes", "input", "output", "user", "no-front-end"):
            (self.base / name).mkdir(parents=True, exist_ok=True)
        for name, folder in self._packs.items():
            (self.base / "custom_nodes" / name).symlink_to(folder.resolve())
        tiny_checkpoints.install(self.base)
        # Not ComfyUI's own: whoever packed the checkout points to folders that are not in it.
        (self._checkout / "extra_model_paths.yaml").unlink(missing_ok=True)

    def start(self) -> ComfyServer:
        """Start it (again) and wait until it answers; AssertionError with its log otherwise."""
        for _ in range(ATTEMPTS):
            self.port = _free_port()
            known = len(self.log)
            with self.log_path.open("ab") as log, Path(os.devnull).open("rb") as nothing:
                streams = (nothing.fileno(), log.fileno(), log.fileno())
                self.process = start_python(self._kind, self._command(), self._environment, streams)
            try:
                if self._wait_until_up():
                    return self
            except BaseException:
                self.kill()
                raise
            if "address already in use" not in self.log[known:]:
                break
        raise AssertionError(f"ComfyUI did not start:\n{self._log_tail()}")

    def _command(self) -> list[str]:
        return [
            *(str(HERE / "launch.py"), str(self._checkout)),
            *("--listen", "127.0.0.1", "--port", str(self.port)),
            *("--base-directory", str(self.base)),
            *("--front-end-root", str(self._front_end)),
            *("--database-url", "sqlite:///:memory:", "--preview-method", "latent2rgb"),
            *("--disable-api-nodes", "--disable-all-custom-nodes"),
            *(["--whitelist-custom-nodes", *self._packs] if self._packs else []),
            *self._arguments,
        ]

    def _wait_until_up(self) -> bool:
        assert self.process is not None
        deadline = time.monotonic() + START_SECONDS
        while self.process.poll() is None:
            if self._answers():
                return True
            if time.monotonic() > deadline:
                self.kill()
            time.sleep(0.05)
        return False

    def _answers(self) -> bool:
        try:
            status, answer = self.request("GET", "/system_stats")
        except NO_ANSWER:
            return False
        # Somebody else's server may have taken the port; ours then ends by itself.
        return status == 200 and str(self.base) in answer["system"]["argv"]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def log(self) -> str:
        """Everything it printed so far, in all its runs."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def _log_tail(self) -> str:
        return "\n".join(self.log.splitlines()[-LOG_TAIL:])

    def request(
        self,
        method: str,
        path: str,
        body: object = None,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[int, Any]:
        """(HTTP status, decoded JSON, or None without a body)."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=REQUEST_SECONDS)
        try:
            text = None if body is None else json.dumps(body)
            given = {"Content-Type": "application/json", **(headers or {})}
            connection.request(method, path, text, given)
            answer = connection.getresponse()
            content = answer.read()
            is_json = "json" in answer.headers.get("Content-Type", "")
            return answer.status, json.loads(content) if is_json and content else content or None
        finally:
            connection.close()

    def get(self, path: str) -> Any:
        """The JSON that a route answers; AssertionError unless with status 200."""
        status, answer = self.request("GET", path)
        assert status == 200, f"GET {path}: {status} {answer}"
        return answer

    def post(self, path: str, body: object) -> Any:
        """As `get`, with a JSON body."""
        status, answer = self.request("POST", path, body)
        assert status == 200, f"POST {path}: {status} {answer}"
        return answer

    def object_info(self, node: str | None = None) -> dict[str, Any]:
        """What the front end knows of one class of nodes, or of all by name."""
        return self.get(f"/object_info/{node}")[node] if node else self.get("/object_info")

    def listen(self, *, previews_with_metadata: bool = True) -> Listener:
        """A connected WebSocket; close it, or use it as a context."""
        return Listener(self.port, previews_with_metadata=previews_with_metadata)

    def queue(self, workflow: Workflow, client_id: str | None = None) -> str:
        """The id of the prompt, which now waits or runs; WorkflowRefused with what is wrong.

        Events of the prompt go to the listener with ``client_id``.
        """
        body = {"prompt": workflow, **({"client_id": client_id} if client_id else {})}
        status, answer = self.request("POST", "/prompt", body)
        if status != 200 or answer["node_errors"]:
            raise WorkflowRefused(_describe_refusal(answer))
        return str(answer["prompt_id"])

    def wait(self, prompt_id: str, seconds: float = PROMPT_SECONDS) -> dict[str, Any]:
        """The prompt's entry in the history, once it has run.

        Raises WorkflowFailed, or WorkflowInterrupted, if it did not run to its end; AssertionError
        if it takes too long or the server ends.
        """
        assert self.process is not None
        deadline = time.monotonic() + seconds
        pause = 0.01
        while True:
            try:
                entry = self.get(f"/history/{prompt_id}").get(prompt_id)
            except NO_ANSWER as error:
                if self.process.poll() is None:
                    self.process.wait(STOP_SECONDS)
                raise AssertionError(
                    f"ComfyUI ended with {self.process.returncode} while a prompt ran:\n"
                    f"{self._log_tail()}"
                ) from error
            if entry is not None:
                _raise_failure(entry)
                return dict(entry)
            if time.monotonic() > deadline:
                raise AssertionError(f"no result after {seconds} s:\n{self._log_tail()}")
            time.sleep(pause)
            pause = min(pause * 1.5, LONGEST_PAUSE)

    def run(
        self, workflow: Workflow, listener: Listener | None = None, seconds: float = PROMPT_SECONDS
    ) -> dict[str, Any]:
        """`queue` and `wait`; with a listener, also until it has the last event of the prompt."""
        prompt_id = self.queue(workflow, listener.client_id if listener else None)
        try:
            return self.wait(prompt_id, seconds)
        finally:
            if listener and self.process is not None and self.process.poll() is None:
                listener.wait_until_done(prompt_id)

    def interrupt(self, prompt_id: str | None = None) -> None:
        """Stop what runs; with an id, only if that is it. A prompt that waits is not affected."""
        self.post("/interrupt", {"prompt_id": prompt_id} if prompt_id else {})

    def free(self, *, unload_models: bool = True, free_memory: bool = True) -> None:
        """Unload the models, forget the results of nodes (``free_memory``); waits until it is done.

        Only while nothing runs. Without forgetting, ComfyUI does not run again what it ran before.
        """
        before = self.get("/test_shim/state")
        counter = "resets" if free_memory else "unloads"
        deadline = time.monotonic() + STOP_SECONDS
        asked = -ASK_AGAIN_SECONDS
        while self.get("/test_shim/state")[counter] == before[counter]:
            assert time.monotonic() < deadline, f"nothing was freed:\n{self._log_tail()}"
            if time.monotonic() - asked > ASK_AGAIN_SECONDS:
                self.post("/free", {"unload_models": unload_models, "free_memory": free_memory})
                asked = time.monotonic()
            time.sleep(0.01)

    def loaded_models(self) -> list[str]:
        """Class names of the models that ComfyUI counts as loaded."""
        return list(self.get("/test_shim/state")["loaded_models"])

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """What a TestSaveTensors node saved under that name."""
        return load_file(self.base / "output" / f"{name}.safetensors")

    def stop(self) -> int:
        """End it as Ctrl-C does, or else with SIGKILL; its exit status."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                return self.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.kill()
        return self.process.returncode

    def kill(self) -> None:
        """SIGKILL; returns when the process is gone."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> ComfyServer:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.stop()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _describe_refusal(answer: Any) -> str:
    if not isinstance(answer, dict):
        return f"the server answered {answer!r}"
    error = answer.get("error") or {}
    lines = [f"{error.get('message', 'not all outputs')} {error.get('details', '')}".strip()]
    for node_id, found in (answer.get("node_errors") or {}).items():
        lines += [
            f"  node {node_id} ({found['class_type']}): {each['message']}: {each['details']}"
            for each in found["errors"]
        ]
    return "\n".join(lines)


def _raise_failure(entry: Mapping[str, Any]) -> None:
    if entry["status"]["status_str"] == "success":
        return
    for name, found in entry["status"]["messages"]:
        if name == "execution_interrupted":
            node = f"{found['node_id']} ({found['node_type']})"
            raise WorkflowInterrupted(f"interrupted at node {node}", node_id=found["node_id"])
        if name == "execution_error":
            raise WorkflowFailed(
                f"node {found['node_id']} ({found['node_type']}) raised "
                f"{found['exception_type']}: {found['exception_message']}\n"
                f"{''.join(found['traceback'])}",
                exception_type=found["exception_type"],
                node_id=found["node_id"],
            )
    raise WorkflowFailed(f"failed without saying why: {entry['status']}")
