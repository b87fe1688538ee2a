"""ComfyUI's real front end in a headless Chromium, for tests of the status panel.

with open_page(server) as page:
    page.open_panel()
    page.wait_for("Ready")
"""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import project
import pytest
from comfyui.server import ComfyServer
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException, WebDriverException
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
LOAD_SECONDS = 60.0
WAIT_SECONDS = 20.0
# As older and newer front ends name it.
TAB = ".xdit-sidecar-tab-button, [data-testid='xdit-sidecar-tab-button']"
PANEL = ".xdit-panel"
SCREENSHOTS = project.ROOT / ".cache" / "screenshots"


def front_end() -> Path:
    """The front end's files, for `ComfyServer(front_end=…)`. Skips the test without them."""
    found = importlib.util.find_spec("comfyui_frontend_package")
    if found is None or found.origin is None:
        pytest.skip("NOT TESTED IN A BROWSER: pip install comfyui-frontend-package")
    return Path(found.origin).with_name("static")


def _programs() -> tuple[str, str]:
    chromium = next(filter(None, map(shutil.which, CHROMIUM)), None)
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("NOT TESTED IN A BROWSER: apt-get install chromium chromium-driver")
    return chromium, driver


class Page:
    """One tab of the browser, at a ComfyUI."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, server: ComfyServer) -> None:
        """Load the front end and wait until it shows the panel's button."""
        self.driver.get(server.url)
        self.wait(lambda: self.find(TAB), "the button of the panel", LOAD_SECONDS)

    def open_panel(self) -> None:
        """Click the button in the sidebar; the panel has not asked yet, perhaps."""
        self.driver.execute_script("arguments[0].click()", self.find(TAB))
        self.wait(lambda: self.find(PANEL), "the panel")

    def close_panel(self) -> None:
        """Click the button again."""
        self.driver.execute_script("arguments[0].click()", self.find(TAB))
        self.wait(lambda: not self.driver.find_elements(By.CSS_SELECTOR, PANEL), "no panel")

    def find(self, selector: str) -> WebElement | None:
        """The first element, or None."""
        return next(iter(self.driver.find_elements(By.CSS_SELECTOR, selector)), None)

    def find_all(self, selector: str) -> list[WebElement]:
        """All of them."""
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector: str = PANEL) -> str:
        """What a person reads there; "" without such an element."""
        with contextlib.suppress(StaleElementReferenceException):
            found = self.find(selector)
            return found.text if found else ""
        return ""

    def wait(self, condition: Callable[[], Any], what: str, seconds: float = WAIT_SECONDS) -> Any:
        """The first true answer of ``condition``."""
        deadline = time.monotonic() + seconds
        while not (answer := condition()):
            assert time.monotonic() < deadline, f"{what}: not within {seconds} s\n{self.text()}"
            time.sleep(0.1)
        return answer

    def wait_for(self, text: str, selector: str = PANEL, seconds: float = WAIT_SECONDS) -> None:
        """Until the text is there to read."""
        self.wait(lambda: text in self.text(selector), repr(text), seconds)

    def script(self, code: str) -> Any:
        """What JavaScript returns."""
        return self.driver.execute_script(code)

    def screenshot(self, name: str) -> Path:
        """Save one below `.cache`."""
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        path = SCREENSHOTS / f"{name}.png"
        self.driver.save_screenshot(str(path))
        return path

    def errors(self) -> list[str]:
        """What the page's console said is wrong with this pack's files."""
        return [
            entry["message"]
            for entry in self.driver.get_log("browser")
            if entry["level"] == "SEVERE" and "xdit" in entry["message"]
        ]


@contextlib.contextmanager
def open_page(server: ComfyServer, name: str) -> Iterator[Page]:
    """A page at the server. Where the block fails, a screenshot with that name is kept."""
    chromium, driver_path = _programs()
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in (
        *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
        *("--window-size=1280,1000", "--no-first-run", "--disable-background-networking"),
        # Nothing outside this machine is asked.
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(driver_path))
    try:
        page = Page(driver)
        try:
            page.open(server)
            yield page
        except BaseException:
            with contextlib.suppress(WebDriverException):
                page.screenshot(f"{name}-failed")
            raise
    finally:
        driver.quit()


def settle(server: ComfyServer, **settings: object) -> None:
    """Set the front end's settings: no first steps shown, and these (Locale, ColorPalette)."""
    values = {"Comfy.TutorialCompleted": True, "Comfy.Locale": "en"}
    values |= {f"Comfy.{name}": value for name, value in settings.items()}
    server.post("/settings", values)
