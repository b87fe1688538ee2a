"""Make example_workflows/ again: each workflow as ComfyUI's front end saves it, and its picture.

One command, half a minute. Needs what the tests of ComfyUI need: Chromium with its driver, the
front end, and a ComfyUI under `.cache/`. The same versions write the same workflows.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "tests"))

import workflow_graphs  # noqa: E402
from comfyui import browser, packs  # noqa: E402
from comfyui.server import ComfyServer  # noqa: E402
from comfyui.tiny_checkpoints import PICTURE  # noqa: E402
from PIL import Image  # noqa: E402
from workflow_graphs import Graph  # noqa: E402

FOLDER = HERE.parent / "example_workflows"
_SCRIPT = (HERE / "workflow_page.js").read_text()
_WIDTH, _HEIGHT = 1800, 1600  # of the window: the graph is drawn large, then made small
_THUMBNAIL = 600  # pixels wide
_MARGIN = 12  # around the graph, in its own units
_SETTLE = 2.0  # seconds until a picture in a node is shown


def build(page: browser.Page, graph: Graph) -> str:
    """The file that the front end would save; its page has the graph then.

    JavascriptException if a node, widget or input is not there.
    """
    script = f"{_SCRIPT}\nreturn buildWorkflow(arguments[0]);"
    return f"{page.driver.execute_script(script, graph.described())}\n"


def draw(page: browser.Page, graph: Graph) -> Image.Image:
    """The graph as the page shows it, without what is around."""
    left, top, width, height = graph.extent(_MARGIN)
    shown = page.driver.execute_script("return [innerWidth, innerHeight]")
    scale = min(shown[0] / width, shown[1] / height)
    page.driver.execute_script(
        f"{_SCRIPT}\nshowGraphOnly(); lookAt(arguments[0]);",
        {"scale": scale, "offset": [-left, -top]},
    )
    time.sleep(_SETTLE)
    whole = Image.open(io.BytesIO(page.driver.get_screenshot_as_png())).convert("RGB")
    graph_only = whole.crop((0, 0, round(width * scale), round(height * scale)))
    size = (_THUMBNAIL, round(_THUMBNAIL * height / width))
    return graph_only.resize(size, Image.Resampling.LANCZOS)


@contextmanager
def comfyui() -> Iterator[ComfyServer]:
    """A ComfyUI whose loaders list the files' names; the files are empty."""
    with tempfile.TemporaryDirectory() as directory:
        base = Path(directory) / "base"
        server = ComfyServer(
            base, packs={"xdit_sidecar": packs.clone()}, front_end=browser.front_end()
        )
        for folder, names in workflow_graphs.MODELS.items():
            for name in names:
                (base / "models" / folder / name).touch()
        (base / "input" / PICTURE).rename(base / "input" / workflow_graphs.PICTURE)
        with server:
            browser.settle(server)
            yield server


def main() -> int:
    """Write all files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=FOLDER)
    out: Path = parser.parse_args().out
    out.mkdir(exist_ok=True)
    with comfyui() as server, browser.open_page(server, "make-workflows") as page:
        page.driver.set_window_size(_WIDTH, _HEIGHT)
        for make in workflow_graphs.ALL:
            graph = make()
            (out / f"{graph.name}.json").write_text(build(page, graph))
            picture = out / f"{graph.name}.jpg"
            draw(page, graph).save(picture, quality=70, optimize=True)
            print(f"{graph.name}: {picture.stat().st_size / 1000:.0f} kB of picture")
    return 0


if __name__ == "__main__":
    sys.exit(main())
