"""The health-check from another account and from another PID namespace."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from daemon_process import running_daemon
from health_command import health_check

# Coverage's data could not be written by another account.
_BARE = ("env", "-u", "COVERAGE_PROCESS_START", "-u", "COVERAGE_PROCESS_CONFIG")
AS_NOBODY = (*_BARE, "setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups")
ELSEWHERE = ("unshare", "--pid", "--fork", "--mount-proc")


def need(wrapper: Sequence[str], why: str) -> None:
    """Skip the test where this host does not let us be someone or somewhere else."""
    code = "import xdit_sidecar.protocol"
    try:
        done = subprocess.run(
            [*wrapper, sys.executable, "-c", code], capture_output=True, check=False
        )
    except FileNotFoundError:
        pytest.skip(why)
    if done.returncode:
        pytest.skip(why)


def test_another_account_is_refused_unless_it_is_trusted(tmp_path: Path) -> None:
    if os.geteuid():
        pytest.skip("NOT TESTED: only root can become another account")
    need(AS_NOBODY, "NOT TESTED: nobody cannot run this Python")
    with running_daemon(tmp_path) as daemon:
        answer = health_check(daemon.runtime_dir, wrapper=AS_NOBODY)
        assert answer.code == 1
        assert answer.named("fail") == ["runtime directory", "sockets", "daemon"]
        assert "another account" in answer.check("daemon")["detail"]
    with running_daemon(tmp_path, "--trust-uid", "65534") as daemon:
        answer = health_check(daemon.runtime_dir, wrapper=AS_NOBODY)
        assert answer.code == 0
        assert "cannot be read by this account" in answer.check("peer")["detail"]


def test_another_pid_namespace_is_told(tmp_path: Path) -> None:
    need(ELSEWHERE, "NOT TESTED: this host allows no new PID namespace")
    with running_daemon(tmp_path) as daemon:
        answer = health_check(daemon.runtime_dir, wrapper=ELSEWHERE)
    assert answer.code == 0
    assert answer.named("warn") == ["peer"]
    assert "different PID namespaces" in answer.check("namespaces")["detail"]
