"""Commands of users, run in this process, and the files that they name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from daemon_process import DaemonProcess
from health_command import assert_no_secrets
from picture_scene import TINY
from safetensors.torch import save_file
from xdit_sidecar.daemon.commands.app import run


class Commands:
    """Commands in this process; what they print is looked at."""

    def __init__(self, runtime_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self._runtime_dir, self._capsys = runtime_dir, capsys

    def __call__(self, *arguments: str | Path) -> tuple[int, str, str]:
        """(exit status, standard output, standard error)."""
        code = run([*map(str, arguments), "--runtime-dir", str(self._runtime_dir)])
        out, err = self._capsys.readouterr()
        assert "Traceback" not in err
        assert_no_secrets(err)
        return code, out, err

    def succeed(self, *arguments: str | Path) -> str:
        code, out, err = self(*arguments)
        assert (code, err) == (0, ""), err
        return out

    def refused(self, *arguments: str | Path, code: int = 1) -> str:
        """The one line that says why."""
        found, out, err = self(*arguments)
        assert (found, out) == (code, ""), err
        assert err.startswith("xdit-sidecar: ")
        assert err.count("\n") == 1
        return err


def whole_checkpoint(path: Path, before_vae: str = "vae.", **changes: Any) -> Path:
    """All parts in one file, with the names that checkpoints have."""
    prefixes = {
        "transformer": "model.diffusion_model.",
        "vae": before_vae,
        "clip_l": "text_encoders.clip_l.transformer.",
        "t5": "text_encoders.t5xxl.transformer.",
    }
    parts = {**TINY.tensors(), **changes}
    tensors = {
        f"{prefixes[role]}{name}": tensor
        for role, part in parts.items()
        for name, tensor in part.items()
    }
    if "clip_l" in parts:
        tensors["text_encoders.clip_l.logit_scale"] = torch.tensor(4.6)
    save_file(tensors, path)
    return path


def evict_all(daemon: DaemonProcess) -> None:
    """Nothing is resident any more."""
    with daemon.client("cleaner") as client:
        for component in client.status().components:
            client.evict(component.fingerprint, component.device)
