"""A daemon whose ranks compile: what clients and the status see of it. One real compilation."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import lora_files
import pytest
import torch
from flux_inputs import comfy_inputs
from ranks_scene import EXACT, SMALL, RanksScene, maps, running_ranks
from xdit_sidecar.protocol import messages as m

COMPILE_SECONDS = 400.0  # of a machine with two cores and much else to do

needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++")),
    reason="NOT COMPILED: torch's compiler needs a C++ compiler, install g++",
)


def keep_code(below: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where daemons keep compiled code from now on."""
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)  # torch may have set it here
    monkeypatch.setenv("XDG_CACHE_HOME", str(below))
    return below / "xdit-sidecar" / "torchinductor"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Code of a test of its own."""
    return keep_code(tmp_path / "cache", monkeypatch)


@pytest.fixture(scope="module")
def one_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compiling") / "cache"


@pytest.fixture
def common_cache(one_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Code of those who compile to the end: what both need, C++ is compiled for by the first."""
    return keep_code(one_cache, monkeypatch)


def told(status: m.Status) -> list[m.TransformerStatus]:
    return [transformer for rank in status.ranks for transformer in rank.transformers]


def wait_for_state(scene: RanksScene, state: str, seconds: float = COMPILE_SECONDS) -> m.Status:
    return wait_for_states(scene, [state], seconds)


def wait_for_states(
    scene: RanksScene, states: list[str], seconds: float = COMPILE_SECONDS
) -> m.Status:
    return scene.daemon.wait_for_status(
        lambda status: [transformer.state for transformer in told(status)] == states, seconds
    )


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).abs().max())


@needs_compiler
@pytest.mark.timeout(600)
def test_ranks_compile_while_they_are_idle(tmp_path: Path, common_cache: Path) -> None:
    sizes = [{"height": 12, "width": 10}, {"height": 16, "width": 20, "text": 31}]
    with running_ranks(tmp_path, 1, "--compile", "on", "--deadline", "30") as scene:
        file = scene.file("small")
        with scene.user() as user:
            (pid,) = scene.rank_pids
            calls = [comfy_inputs(SMALL, batch=1, **size) for size in sizes]  # type: ignore[arg-type]
            expected = [file.alone(call) for call in calls]
            assert difference(user.forward(calls[0]), expected[0]) <= EXACT
            wait_for_state(scene, "compiling", 5)
            # A job that comes meanwhile is served, after a piece at the latest; the rest goes on.
            time.sleep(1.0)
            assert difference(user.forward(calls[0]), expected[0]) <= EXACT
            wait_for_state(scene, "compiling", 0.1)
            wait_for_state(scene, "compiled")
            for call, alone in zip(calls * 2, expected * 2, strict=True):
                assert difference(user.forward(call), alone) <= EXACT
            assert [transformer.state for transformer in told(scene.status)] == ["compiled"]
            assert scene.rank_pids == [pid]  # a piece may take longer than a turn
            # With a LoRA, code of its own; what is added is not compiled.
            tensors = lora_files.neutral(SMALL, 1)
            with user.lora(tmp_path / "lora.safetensors", tensors) as lora:
                job = user.job(adapters=[m.Adapter(lora)])
                styled = user.forward(calls[0], job=job)
                assert difference(styled, expected[0]) > 1e-2
                assert [(t.lora, t.state) for t in told(scene.status)] == [
                    (False, "compiled"),
                    (True, "compiling"),
                ]
                wait_for_states(scene, ["compiled", "compiled"])
                for _ in range(2):
                    assert difference(user.forward(calls[0], job=job), styled) <= EXACT
                    assert difference(user.forward(calls[0]), expected[0]) <= EXACT
            assert scene.rank_pids == [pid]
            assert "not-compiled" not in scene.daemon.log
        with scene.daemon.client("evictor") as client:
            for fingerprint in (user.fingerprint, lora):
                client.evict(fingerprint, "cpu")
        scene.daemon.wait_for_status(lambda status: not status.components)
        assert maps(pid) == 0  # compiled code holds nothing of the weights
        assert told(scene.status) == []
        # The same file again: its code is there, so that it is only compared.
        with scene.user() as user:
            user.forward(calls[0])
            wait_for_state(scene, "compiled", 60)
            assert difference(user.forward(calls[0]), expected[0]) <= EXACT
    assert common_cache.stat().st_mode & 0o777 == 0o700
    assert any(common_cache.iterdir())
    assert list(common_cache.glob("precompiled_headers/*.gch"))  # not in /tmp


@needs_compiler
@pytest.mark.usefixtures("common_cache")
@pytest.mark.timeout(600)
def test_ranks_that_share_tokens_compile_too(tmp_path: Path) -> None:
    # Tokens that two ranks can share evenly, and such that they cannot.
    sizes = [{"height": 12, "width": 10, "text": 8}, {"height": 14, "width": 6, "text": 31}]
    with running_ranks(tmp_path, 2, "--compile", "on", "--deadline", "30") as scene:
        file = scene.file("small")
        with scene.user() as user:
            pids = scene.rank_pids
            calls = [comfy_inputs(SMALL, batch=1, **size) for size in sizes]  # type: ignore[arg-type]
            assert difference(user.forward(calls[0]), file.alone(calls[0])) <= EXACT
            scene.daemon.wait_for_status(
                lambda s: [one.state for one in told(s)] == ["compiled"] * 2, COMPILE_SECONDS
            )
            for call in calls * 2:
                assert difference(user.forward(call), file.alone(call)) <= EXACT
            assert [one.state for one in told(scene.status)] == ["compiled"] * 2
            assert scene.rank_pids == pids


@needs_compiler
@pytest.mark.usefixtures("cache")
def test_ranks_that_die_compiling_are_started_without(tmp_path: Path) -> None:
    call = comfy_inputs(SMALL)
    with running_ranks(tmp_path, 1, "--compile", "on") as scene, scene.user() as user:
        expected = scene.file("small").alone(call)
        for starts in (2, 3):
            assert difference(user.forward(call), expected) <= EXACT
            wait_for_state(scene, "compiling", 10)
            time.sleep(1.0)  # now it compiles
            os.kill(scene.rank_pids[0], signal.SIGKILL)
            scene.wait_until_ready(starts)
        scene.daemon.wait_for_log("compile-given-up")
        assert difference(user.forward(call), expected) <= EXACT
        assert told(scene.status) == []


def test_code_is_not_kept_where_others_may_write(tmp_path: Path, cache: Path) -> None:
    cache.parent.mkdir(parents=True)
    os.chmod(cache.parent, 0o777)  # noqa: S103  that is the point
    with running_ranks(tmp_path, 1, "--compile", "on") as scene, scene.user() as user:
        call = comfy_inputs(SMALL)
        assert difference(user.forward(call), scene.file("small").alone(call)) <= EXACT
        status = wait_for_state(scene, "refused", 10)
        assert "others may write to" in str(told(status)[0].reason)
        assert "others may write to" in scene.daemon.wait_for_log("not-compiled")


def test_on_the_cpu_nothing_is_compiled_unless_asked_for(lone_scene: RanksScene) -> None:
    with lone_scene.user() as user:
        user.forward(comfy_inputs(SMALL))
        assert told(lone_scene.status) == []
