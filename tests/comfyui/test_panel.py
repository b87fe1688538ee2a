"""The status panel: its routes, and itself in a real browser at a real ComfyUI and daemon."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import components
import pytest
from comfyui import browser, packs, workflows
from comfyui.nodes_scene import SHARED
from comfyui.server import ComfyServer
from daemon_process import DaemonProcess, running_daemon
from xdit_sidecar.protocol.client.client import Client

pytestmark = pytest.mark.timeout(300)

PANEL = {"X-XDiT-Panel": "1"}
HOSTILE = "<img src=x onerror=window.hacked=1>"
PROGRAM = f"tool {HOSTILE}"
LABEL = f"{HOSTILE}.safetensors"
CLIP = "tiny-clip_l.safetensors"


@dataclass
class Scene:
    """A ComfyUI with the real front end, its daemon with a rank, and another client of that."""

    server: ComfyServer
    daemon: DaemonProcess


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    directory = tmp_path_factory.mktemp("panel")
    with (
        running_daemon(directory, "--ranks", "1") as daemon,
        daemon.client(PROGRAM) as client,
        comfyui(directory, daemon, browser.front_end()) as server,
    ):
        held = hand_over(client)
        server.run(workflows.encode_only(SHARED))
        daemon.wait_for_status(lambda s: s.group.state == "ready", 90)
        yield Scene(server, daemon)
        held.release()


def comfyui(directory: Path, daemon: DaemonProcess, front_end: Path) -> ComfyServer:
    return ComfyServer(
        directory / "base",
        packs={"xdit_sidecar": packs.clone()},
        environment={"XDIT_SIDECAR_RUNTIME_DIR": str(daemon.runtime_dir)},
        front_end=front_end,
    )


def hand_over(client: Client) -> Any:
    tensors = components.random_tensors(3)
    component = components.describe(tensors, LABEL)
    return client.hand_over(component, "cpu", lambda writer: writer.copy_tensors(tensors))


# --- the routes


def test_status(scene: Scene) -> None:
    status, answer = scene.server.request("GET", "/api/xdit/status", headers=PANEL)
    assert status == 200
    assert answer["daemon"]["pid"] == scene.daemon.pid
    assert answer["health"] == "ready"
    assert answer["problems"] == []
    assert [(rank["rank"], rank["state"]) for rank in answer["ranks"]] == [(0, "ready")]
    assert answer["queue"] == 0
    found = {component["name"]: component for component in answer["components"]}
    (sharer,) = found[LABEL]["sharers"]
    assert sharer["program"] == PROGRAM
    assert not sharer["this_process"]
    assert found[LABEL]["kind"] == "vae"
    assert found[LABEL]["size"] > 0
    (sharer,) = found[CLIP]["sharers"]
    assert sharer["this_process"]
    assert sharer["pid"] == scene.server.pid
    assert str(scene.daemon.runtime_dir) not in json.dumps(answer)


def test_health_check(scene: Scene) -> None:
    status, answer = scene.server.request("POST", "/xdit/health-check", headers=PANEL)
    assert status == 200
    assert answer["ok"]
    rows = {check["name"]: check for check in answer["checks"]}
    assert rows["region cpu"]["status"] == "ok"
    # It runs inside ComfyUI.
    assert f"(pid {scene.server.pid}" in rows["clients"]["detail"]


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Content-Type": "text/plain"},
        {**PANEL, "Sec-Fetch-Site": "cross-site"},
        {**PANEL, "Sec-Fetch-Site": "same-site"},
        {**PANEL, "Origin": "http://elsewhere.example"},
    ],
    ids=["plain", "form", "cross-site", "other port", "other origin"],
)
def test_other_sites_are_not_answered(scene: Scene, headers: dict[str, str]) -> None:
    for method, route in (("POST", "/xdit/health-check"), ("GET", "/xdit/status")):
        if method == "GET" and "Origin" in headers:
            continue  # ComfyUI looks at it, and only where something could be changed
        status, answer = scene.server.request(method, route, headers=headers)
        assert status == 403
        assert not answer or answer["code"] == "cross-site"


def test_checks_run_one_at_a_time(scene: Scene) -> None:
    barrier = threading.Barrier(4)
    answers = []

    def check() -> None:
        barrier.wait()
        answers.append(scene.server.request("POST", "/xdit/health-check", headers=PANEL))

    threads = [threading.Thread(target=check) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    statuses = sorted(status for status, _ in answers)
    assert statuses[0] == 200
    assert statuses[-1] == 409
    refused = [answer for status, answer in answers if status == 409]
    assert all(answer["code"] == "check-runs" and answer["what_to_do"] for answer in refused)
    status, _ = scene.server.request("POST", "/xdit/health-check", headers=PANEL)
    assert status == 200


# --- the panel


def open_panel(page: browser.Page, ready: str) -> None:
    page.open_panel()
    page.wait_for(ready, ".xdit-headline")


def rows(page: browser.Page, part: str) -> list[str]:
    return [row.text for row in page.find_all(f'[data-part="{part}"] tbody tr')]


def test_panel_in_english(scene: Scene) -> None:
    browser.settle(scene.server)
    with browser.open_page(scene.server, "panel-english") as page:
        open_panel(page, "Ready")
        page.screenshot("panel-english")
        assert f"pid {scene.daemon.pid}" in page.text()
        assert "free of" in page.text('[data-part="devices"]')
        assert "No jobs" in page.text('[data-part="ranks"]')
        (rank,) = rows(page, "ranks")
        assert "ready" in rank
        table = {row.splitlines()[0]: row for row in rows(page, "components")}
        assert "2 MiB" in table[LABEL]
        assert PROGRAM in table[LABEL]
        assert "this ComfyUI" in table[CLIP]
        assert f"pid {scene.server.pid}" in table[CLIP]

        # Names stay text, also where they look like HTML.
        assert page.script("return window.hacked") is None
        assert page.find(".xdit-panel img") is None

        # For the keyboard and screen readers.
        button = page.find(".xdit-button")
        assert button.aria_role == "button"
        assert button.accessible_name == "Run health-check"
        assert page.find(".xdit-panel").accessible_name == "xDiT sidecar status"
        assert page.find(".xdit-headline").get_attribute("aria-live") == "polite"
        assert [table.aria_role for table in page.find_all(".xdit-panel table")] == ["table"] * 2

        page.script("document.querySelector('.xdit-button').focus()")
        button.send_keys("\n")
        page.wait_for("Healthy: ", ".xdit-verdict")
        assert page.script("return document.activeElement.className") == "xdit-button"
        checks = page.find_all(".xdit-checks li")
        assert len(checks) > 10
        names = [check.text for check in checks]
        assert any("region cpu" in name for name in names)
        assert {check.get_attribute("data-status") for check in checks} <= {"ok", "skip", "warn"}
        page.screenshot("panel-english-checked")
        assert page.errors() == []


def test_panel_in_chinese(scene: Scene) -> None:
    browser.settle(scene.server, Locale="zh", ColorPalette="light")
    with browser.open_page(scene.server, "panel-chinese") as page:
        open_panel(page, "就绪")
        text = page.text()
        assert "组件" in text
        assert "本 ComfyUI" in text
        assert "没有任务" in text
        page.find(".xdit-button").click()
        page.wait_for("正常", ".xdit-verdict")
        page.screenshot("panel-chinese")
        assert page.errors() == []


def test_panel_asks_only_while_it_is_seen(scene: Scene) -> None:
    browser.settle(scene.server)
    asked = "return performance.getEntriesByName(location.origin + '/api/xdit/status').length"
    later = "setTimeout(arguments[0], {})"
    with browser.open_page(scene.server, "panel-hidden") as page:
        page.script("performance.setResourceTimingBufferSize(10000)")  # the page has filled it
        assert page.script(asked) == 0
        open_panel(page, "Ready")
        page.wait(lambda: page.script(asked) >= 3, "it asks again")

        page.close_panel()
        page.driver.execute_async_script(later.format(1000))  # a question that was under way
        closed = page.script(asked)
        page.driver.execute_async_script(later.format(7000))
        assert page.script(asked) == closed

        page.open_panel()
        page.wait(lambda: page.script(asked) >= closed + 2, "it asks again")
        page.wait_for("Ready", ".xdit-headline")
        assert len(page.find_all(browser.PANEL)) == 1


def test_daemon_goes_and_comes_back(tmp_path: Path) -> None:
    daemon = DaemonProcess(tmp_path)
    try:
        with comfyui(tmp_path, daemon, browser.front_end()) as server:
            status, answer = server.request("GET", "/xdit/status", headers=PANEL)
            assert status == 503
            assert answer["code"] == "absent"
            assert "xdit-sidecar serve" in answer["what_to_do"]
            status, answer = server.request("POST", "/xdit/health-check", headers=PANEL)
            assert status == 200
            assert not answer["ok"]

            browser.settle(server)
            with browser.open_page(server, "panel-daemon") as page:
                page.open_panel()
                page.wait_for("No answer", ".xdit-headline")
                assert "xdit-sidecar serve" in page.text(".xdit-trouble")
                assert "What to do" in page.text(".xdit-trouble")
                assert page.text('[data-part="components"]') == ""
                page.find(".xdit-button").click()
                page.wait_for("checks failed", ".xdit-verdict")
                page.screenshot("panel-no-daemon")

                daemon.start()
                page.wait_for("Ready", ".xdit-headline")
                assert page.text(".xdit-trouble") == ""
                assert "No ranks" in page.text('[data-part="ranks"]')
                assert "Nothing is resident" in page.text('[data-part="components"]')
                assert page.text(".xdit-verdict") == ""  # that was without a daemon

                daemon.stop()
                page.wait_for("No answer", ".xdit-headline")
                daemon.start()
                page.wait_for("Ready", ".xdit-headline")
                with daemon.client(PROGRAM) as client:
                    held = hand_over(client)
                    page.wait_for(LABEL, '[data-part="components"]')
                    held.release()

                server.stop()
                page.wait_for("ComfyUI’s server does not answer", ".xdit-trouble")
    finally:
        daemon.close()
