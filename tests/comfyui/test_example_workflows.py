"""The example workflows: in the template browser, in the front end's page, and run.

All are opened in one page of a real ComfyUI, whose models/ has tiny files of the names in the
workflows. What came of it is then looked at.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import make_workflows
import project
import pytest
import workflow_graphs
from comfyui import browser, packs, tiny_checkpoints
from comfyui.server import ComfyServer
from daemon_process import running_daemon
from PIL import Image

pytestmark = pytest.mark.timeout(300)

PACK = "xdit_sidecar"
FOLDER = project.ROOT / "example_workflows"
NAMES = [make().name for make in workflow_graphs.ALL]
LARGEST_PICTURE = 40_000  # bytes
TINY = {
    "flux1-dev.safetensors": tiny_checkpoints.DIFFUSION_MODEL,
    "clip_l.safetensors": tiny_checkpoints.CLIP_L,
    "t5xxl_fp16.safetensors": tiny_checkpoints.T5XXL,
    "ae.safetensors": tiny_checkpoints.AUTOENCODER,
    "my_flux_lora.safetensors": tiny_checkpoints.LORA,
}
#: What would take long on a CPU.
SMALLER = {"width": 256, "height": 192, "steps": 3}
#: In the place of FluxKontextImageScale, which makes a million pixels of any picture.
SCALE = {"upscale_method": "area", "crop": "disabled", "width": 0, "height": 0}
LOADED = """
const [name, done] = arguments;
(async () => {
  const { app, LiteGraph } = window;
  const answer = await fetch(`/api/workflow_templates/xdit_sidecar/${name}.json`);
  const workflow = await answer.json();
  await app.loadGraphData(workflow, true, true, name, { openSource: "template" });
  await new Promise((resolve) => setTimeout(resolve, 300));
  const dialogs = [...document.querySelectorAll(".p-dialog, [role=dialog]")];
  const errors = [...document.querySelectorAll(".p-toast-message")];
  const { output, workflow: saved } = await app.graphToPrompt();
  return {
    output, saved,
    shown: [...dialogs, ...errors].map((each) => each.innerText),
    nodes: Object.fromEntries(app.graph.nodes.map((node) => [node.id, {
      type: node.type,
      known: node.type in LiteGraph.registered_node_types && !node.has_errors,
      values: (node.widgets ?? []).filter((each) => each.serialize !== false)
        .map((each) => each.value),
    }])),
  };
})().then(done, (error) => done({ error: String(error.stack) }));
"""


@dataclass
class Scene:
    """A ComfyUI and what its page made of each workflow."""

    server: ComfyServer
    loaded: dict[str, Any]
    built: dict[str, str]
    cards: list[dict[str, Any]]
    clicked: list[str]
    errors: list[str]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    directory = tmp_path_factory.mktemp("examples")
    with running_daemon(directory, "--ranks", "1") as daemon:
        server = ComfyServer(
            directory / "base",
            packs={PACK: packs.clone()},
            environment={"XDIT_SIDECAR_RUNTIME_DIR": str(daemon.runtime_dir)},
            front_end=browser.front_end(),
        )
        put_tiny_files(server.base)
        with server:
            browser.settle(server)
            with browser.open_page(server, "example-workflows") as page:
                page.driver.set_script_timeout(browser.LOAD_SECONDS)
                loaded = {name: page.driver.execute_async_script(LOADED, name) for name in NAMES}
                graphs = [make() for make in workflow_graphs.ALL]
                built = {graph.name: make_workflows.build(page, graph) for graph in graphs}
                cards = template_cards(page)
                clicked = click_card(page, "flux_lora")
                errors = page.errors()
            daemon.wait_for_status(lambda s: s.group.state == "ready", 90)
            yield Scene(server, loaded, built, cards, clicked, errors)


def put_tiny_files(base: Path) -> None:
    for folder, names in workflow_graphs.MODELS.items():
        for name in names:
            shutil.copy(base / "models" / folder / TINY[name], base / "models" / folder / name)
    shutil.copy(base / "input" / tiny_checkpoints.PICTURE, base / "input" / workflow_graphs.PICTURE)


def template_cards(page: browser.Page) -> list[dict[str, Any]]:
    """The pictures that ComfyUI's template browser shows, and the words around each."""
    page.driver.set_window_size(1600, 1600)  # it loads what is in view
    page.script("window.app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    found = page.wait(
        lambda: page.script(
            f"""const found = [...document.querySelectorAll('[role=dialog] img')].map((each) => ({{
                words: each.closest('[data-testid]').innerText,
                size: [each.naturalWidth, each.naturalHeight],
            }}));
            return found.length >= {len(NAMES)} && found.every((each) => each.size[0]) && found;"""
        ),
        "the template browser's pictures",
    )
    page.screenshot("example-workflows")
    return list(found)


def click_card(page: browser.Page, name: str) -> list[str]:
    """The types of the nodes that a click in the open template browser brings into the page."""
    page.script("window.app.graph.clear()")
    page.script(
        f"""[...document.querySelectorAll('[role=dialog] img')]
            .find((each) => each.closest('[data-testid]').innerText.startsWith('{name}')).click()"""
    )
    return list(
        page.wait(
            lambda: page.script("return window.app.graph.nodes.map((each) => each.type)"),
            "the clicked workflow",
        )
    )


def committed(name: str) -> dict[str, Any]:
    return dict(json.loads((FOLDER / f"{name}.json").read_text()))


def test_every_file_is_one_that_the_script_makes() -> None:
    expected = {f"{name}{ending}" for name in NAMES for ending in (".json", ".jpg")}
    assert {path.name for path in FOLDER.iterdir()} == expected


def test_comfyui_lists_and_serves_them(scene: Scene) -> None:
    assert sorted(scene.server.get("/workflow_templates")[PACK]) == sorted(NAMES)
    for name in NAMES:
        status, answer = scene.server.request("GET", f"/api/workflow_templates/{PACK}/{name}.json")
        assert (status, answer) == (200, committed(name))
        picture = FOLDER / f"{name}.jpg"
        status, answer = scene.server.request("GET", f"/api/workflow_templates/{PACK}/{name}.jpg")
        assert (status, answer) == (200, picture.read_bytes())
        assert len(answer) <= LARGEST_PICTURE
        with Image.open(picture) as opened:
            assert opened.format == "JPEG"
            assert opened.convert("L").entropy() > 1


def test_the_template_browser_shows_their_pictures(scene: Scene) -> None:
    shown = {card["words"].splitlines()[0]: tuple(card["size"]) for card in scene.cards}
    assert sorted(shown) == sorted(NAMES)
    for name in NAMES:
        with Image.open(FOLDER / f"{name}.jpg") as picture:
            assert shown[name] == picture.size
    assert sorted(scene.clicked) == sorted(node["type"] for node in committed("flux_lora")["nodes"])
    assert scene.errors == []


@pytest.mark.parametrize("name", NAMES)
def test_the_front_end_loads_it_whole(scene: Scene, name: str) -> None:
    found = scene.loaded[name]
    assert "error" not in found, found["error"]
    assert found["shown"] == []
    saved = committed(name)
    assert saved["version"] == 0.4
    assert len(saved["nodes"]) == len(found["nodes"]) > 8
    for node in saved["nodes"]:
        loaded = found["nodes"][str(node["id"])]
        assert loaded["known"], node["type"]
        assert loaded["type"] == node["type"]
        assert loaded["values"] == node.get("widgets_values", [])
    assert found["saved"]["links"] == saved["links"]


@pytest.mark.parametrize("name", NAMES)
def test_every_value_is_valid_for_its_node(scene: Scene, name: str) -> None:
    info = scene.server.object_info()
    output = scene.loaded[name]["output"]
    for node in output.values():
        described = info[node["class_type"]]["input"]
        allowed = {**described.get("required", {}), **described.get("optional", {})}
        assert set(described.get("required", {})) <= set(node["inputs"])
        for key, value in node["inputs"].items():
            if key not in allowed:  # the button of LoadImage
                assert (node["class_type"], key) == ("LoadImage", "upload")
                continue
            check_value(f"{node['class_type']}.{key}", value, allowed[key], info, output)


def check_value(place: str, value: Any, schema: list[Any], info: Any, output: Any) -> None:
    kind, options = schema[0], schema[1] if len(schema) > 1 else {}
    if isinstance(value, list):
        source, number = value
        assert info[output[source]["class_type"]]["output"][number] == kind, place
    elif isinstance(kind, list) or kind == "COMBO":
        assert value in (kind if isinstance(kind, list) else options["options"]), place
    elif kind in ("INT", "FLOAT"):
        assert isinstance(value, int if kind == "INT" else int | float), place
        assert not isinstance(value, bool), place
        assert options.get("min", -math.inf) <= value <= options.get("max", math.inf), place
    else:
        assert isinstance(value, {"STRING": str, "BOOLEAN": bool}[kind]), place


@pytest.mark.parametrize("name", NAMES)
def test_it_runs(scene: Scene, name: str) -> None:
    prompt = json.loads(json.dumps(scene.loaded[name]["output"]))
    for node in prompt.values():
        inputs = node["inputs"]
        if node["class_type"] == "FluxKontextImageScale":
            node["class_type"] = "ImageScale"
            inputs |= SCALE
        inputs |= {key: small for key, small in SMALLER.items() if key in inputs}
    (saver,) = (key for key, node in prompt.items() if node["class_type"] == "SaveImage")
    # Beside the PNG, the numbers that it is made of.
    images = prompt[saver]["inputs"]["images"]
    prompt["numbers"] = {
        "class_type": "TestSaveTensors",
        "inputs": {"name": name, "images": images},
    }
    entry = scene.server.run(prompt, seconds=200)
    (saved,) = entry["outputs"][saver]["images"]
    path = scene.server.base / "output" / saved["subfolder"] / saved["filename"]
    with Image.open(path) as picture:
        assert picture.width * picture.height > 40_000
        assert all(low < high for low, high in picture.getextrema())
    numbers = scene.server.tensors(name)["images"]
    assert numbers.isfinite().all()
    assert numbers.std() > 0.01


@pytest.mark.parametrize("name", NAMES)
def test_it_is_what_the_script_makes(scene: Scene, name: str) -> None:
    """Run examples/make_workflows.py when this fails."""
    built = json.loads(scene.built[name])
    assert [essence(node) for node in built["nodes"]] == [
        essence(node) for node in committed(name)["nodes"]
    ]
    assert built["links"] == committed(name)["links"]
    assert built["groups"] == committed(name)["groups"]


def essence(node: dict[str, Any]) -> dict[str, Any]:
    """A node without what another version of the front end may write differently."""
    return {key: node.get(key) for key in ("id", "type", "pos", "widgets_values")}
