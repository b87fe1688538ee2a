"""The node pack as ComfyUI sees it: installed, described, explained, and there only once."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import project
import pytest
import torch
from comfyui import packs, tiny_checkpoints, workflows
from comfyui.nodes_scene import CHECKPOINT, LOADER, LOCAL, behind_share
from comfyui.server import ComfyServer, WorkflowFailed
from comfyui.workflows import STOCK, WHOLE_CHECKPOINT, Settings
from comfyui_checkout import comfyui
from daemon_process import running_daemon
from xdit_sidecar.daemon.commands.app import run
from xdit_sidecar.protocol.version import PROTOCOL_VERSION

pytestmark = pytest.mark.timeout(240)

NODES = (
    *("XDiTUNetLoader", "XDiTLoadVAE", "XDiTLoadCLIP", "XDiTLoadDualCLIP", "XDiTLoadCheckpoint"),
    *("XDiTShare", "XDiTKSampler", "XDiTVAEDecode", "XDiTVAEEncode", "XDiTStatus"),
)
PACK = project.PACKAGE
LANGUAGES = ("en", "zh")
MOST_SECONDS = 3.0  # ten times what is promised; `make bench` measures that
# The checkout is installed in the tests' environment; a user's ComfyUI has no such thing.
NOT_INSTALLED = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in getattr(f, "__module__", "")]
"""


def environment(directory: Path) -> dict[str, str]:
    """Of a ComfyUI that has no package xdit_sidecar, and no daemon."""
    site = directory / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(NOT_INSTALLED)
    return {"PYTHONPATH": str(site), "XDIT_SIDECAR_RUNTIME_DIR": str(directory / "run")}


def whitelist(*names: str) -> list[str]:
    return ["--whitelist-custom-nodes", "test_shim", *names]


def installed(server: ComfyServer, name: str = PACK) -> Path:
    """What `xdit-sidecar node install` puts into this server's folder, perhaps under a name."""
    assert run(["node", "install", str(server.base)]) == 0
    folder = server.base / "custom_nodes" / PACK
    return folder if name == PACK else folder.rename(folder.with_name(name))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """The pack as users have it: a copy, its requirements, and no daemon."""
    directory = tmp_path_factory.mktemp("pack")
    made = ComfyServer(
        directory / "base", arguments=whitelist(PACK), environment=environment(directory)
    )
    installed(made)
    with made:
        yield made


@pytest.fixture(scope="module")
def described(server: ComfyServer) -> dict[str, Any]:
    """What ComfyUI says about our nodes."""
    return {name: server.object_info(name) for name in NODES}


def inputs(node: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Name → options of all inputs."""
    return {
        name: spec[1]
        for kind in ("required", "optional")
        for name, spec in node["input"].get(kind, {}).items()
    }


def test_a_copy_is_all_that_it_takes(server: ComfyServer, described: dict[str, Any]) -> None:
    assert {node["python_module"] for node in described.values()} == {f"custom_nodes.{PACK}"}
    assert {name for name in server.object_info() if name.startswith("XDiT")} == set(NODES)
    assert not re.search(r"xDiT: the nodes of .* installed", server.log)


def test_import_is_quick(server: ComfyServer) -> None:
    found = re.search(rf"([\d.]+) seconds: .*custom_nodes/{PACK}$", server.log, re.MULTILINE)
    assert found, server.log
    assert float(found[1]) < MOST_SECONDS


def test_english_is_that_of_the_nodes(server: ComfyServer, described: dict[str, Any]) -> None:
    translated = server.get("/i18n")["en"]["nodeDefs"]
    ours = {name: texts for name, texts in translated.items() if name.startswith("XDiT")}
    assert ours.keys() == described.keys()
    for name, node in described.items():
        expected: dict[str, Any] = {
            "display_name": node["display_name"],
            "description": node["description"],
        }
        fields = {}
        for key, options in inputs(node).items():
            fields[key] = {"name": key, "tooltip": options["tooltip"]}
            if options.get("control_after_generate"):
                fields["control_after_generate"] = {"name": "control after generate"}
        if fields:
            expected["inputs"] = fields
        names = enumerate(node["output_name"])
        expected["outputs"] = {str(number): {"name": text} for number, text in names}
        assert ours[name] == expected, name


def test_chinese_has_all_of_it(server: ComfyServer) -> None:
    translated = server.get("/i18n")
    english, chinese = (translated[language]["nodeDefs"] for language in LANGUAGES)

    def compare(one: Any, other: Any, where: str) -> None:
        assert type(one) is type(other), where
        if isinstance(one, str):
            assert other.strip(), where
            if where.rpartition(".")[2] in ("description", "tooltip"):
                assert re.search(r"[\u4e00-\u9fff]", other), where
            return
        assert one.keys() == other.keys(), where
        for key in one:
            compare(one[key], other[key], f"{where}.{key}")

    for name in NODES:
        compare(english[name], chinese[name], name)


def _strings(value: Any) -> Iterator[str]:
    """All texts in what JSON gives, keys aside."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _strings(each)


def test_texts_mean_nothing_special_to_the_front_end() -> None:
    # Its translation library gives these signs a meaning of their own.
    for language in LANGUAGES:
        text = (project.ROOT / "locales" / language / "nodeDefs.json").read_text()
        strings = list(_strings(json.loads(text)))
        assert strings
        assert not [value for value in strings if re.search(r"[{}@|$]", value)]


@pytest.mark.parametrize("name", NODES)
def test_help_is_served(server: ComfyServer, described: dict[str, Any], name: str) -> None:
    # Where the front end looks: for the language, else for the page that has none (English).
    # Of a path such as custom_nodes.xdit_sidecar it takes the second part.
    folder = f"/extensions/{PACK}/docs"
    chinese_names = server.get("/i18n")["zh"]["nodeDefs"][name]
    pages = {}
    for language, path in (("en", f"{folder}/{name}.md"), ("zh", f"{folder}/{name}/zh.md")):
        status, body = server.request("GET", path)
        assert status == 200, path
        pages[language] = body.decode()
        for key in inputs(described[name]):
            assert re.search(rf"(\*\*|`){key}(\*\*|`)", pages[language]), (path, key)
        for output in described[name]["output_name"]:
            assert output in pages[language], (path, output)
        assert "`pip install '.[daemon]'`" in pages[language]
        assert "`xdit-sidecar serve`" in pages[language]
    assert pages["en"].startswith(f"# {described[name]['display_name']}\n")
    assert pages["zh"].startswith(f"# {chinese_names['display_name']}\n")
    assert pages["en"].count("\n## ") == pages["zh"].count("\n## ") == 5
    for key, texts in chinese_names.get("inputs", {}).items():
        if key != "control_after_generate":
            assert f"**{texts['name']}**（`{key}`" in pages["zh"], key


def test_help_has_no_page_of_an_unknown_node() -> None:
    folder = project.ROOT / "comfy_client_node/web/docs"
    assert {path.name.removesuffix(".md") for path in folder.iterdir()} == set(NODES)


def test_log_tells_how_to_get_a_daemon(server: ComfyServer) -> None:
    lines = [line for line in server.log.splitlines() if "xDiT: no daemon in " in line]
    assert len(lines) == 1
    assert_helps(lines[0])


def assert_helps(text: str) -> None:
    assert "in an environment of its own" in text
    assert "`pip install '.[daemon]'` in a clone" in text
    assert "`xdit-sidecar serve`" in text


LOADERS = {
    "XDiTUNetLoader": LOADER,
    "XDiTLoadVAE": {"vae_name": tiny_checkpoints.AUTOENCODER},
    "XDiTLoadCLIP": {"clip_name": tiny_checkpoints.CLIP_L},
    "XDiTLoadDualCLIP": {
        "clip_name1": tiny_checkpoints.CLIP_L,
        "clip_name2": tiny_checkpoints.T5XXL,
    },
    "XDiTLoadCheckpoint": {"ckpt_name": tiny_checkpoints.CHECKPOINT},
}


@pytest.mark.parametrize("name", LOADERS)
def test_loaders_tell_how_to_get_a_daemon(
    server: ComfyServer, described: dict[str, Any], name: str
) -> None:
    output = described[name]["output_name"][0].lower()
    workflow = {
        "loader": {"class_type": name, "inputs": dict(LOADERS[name])},
        "report": {
            "class_type": "TestReportParameters",
            "inputs": {output: ["loader", 0], "load": False},
        },
    }
    with pytest.raises(WorkflowFailed, match="no xdit-sidecar daemon answers") as caught:
        server.run(workflow)
    assert_helps(str(caught.value))


HERE = {"on_problem": "load in ComfyUI"}
LOCALLY = {"on_problem": "sample locally"}
WITHOUT_DAEMON = {
    "parts": replace(
        LOCAL,
        vae="XDiTLoadVAE",
        vae_inputs={**STOCK.vae_inputs, **HERE},
        clip="XDiTLoadDualCLIP",
        clip_inputs={**LOADERS["XDiTLoadDualCLIP"], **HERE},
    ),
    "checkpoint": replace(
        CHECKPOINT, checkpoint_inputs={**CHECKPOINT.checkpoint_inputs, **LOCALLY}
    ),
}


@pytest.mark.parametrize("name", WITHOUT_DAEMON)
def test_loaders_do_without_a_daemon_where_that_is_set(server: ComfyServer, name: str) -> None:
    """What comes out is the stock loaders', to the bit, and each node warns."""
    nodes, settings = WITHOUT_DAEMON[name], Settings(prompt=f"alone {name}")
    stock = WHOLE_CHECKPOINT if nodes.checkpoint else STOCK
    server.run(workflows.text_to_image(stock, settings, save="stock"))
    workflow = workflows.text_to_image(nodes, settings, save="ours")
    loaders = {key for key, node in workflow.items() if node["class_type"].startswith("XDiT")}
    with server.listen() as listener:
        server.run(workflow, listener)
        told = {event.data["node"]: event.data["text"] for event in listener.named("text")}
    assert told.keys() == loaders
    assert all("no xdit-sidecar daemon answers" in text for text in told.values())
    for part in ("", "-image"):
        ours, expected = (server.tensors(f"{save}{part}") for save in ("ours", "stock"))
        assert all(torch.equal(ours[key], expected[key]) for key in expected)


def test_share_does_without_a_daemon_where_that_is_set(server: ComfyServer) -> None:
    workflow = behind_share(workflows.coding(STOCK, Settings(prompt="share"), save="ours"))
    with pytest.raises(WorkflowFailed, match="no xdit-sidecar daemon answers") as caught:
        server.run(workflow)
    assert_helps(str(caught.value))
    workflow["share"]["inputs"] |= HERE
    server.run(workflow)
    workflow = workflows.encode_only(
        replace(STOCK, clip="XDiTLoadCLIP", clip_inputs={**LOADERS["XDiTLoadCLIP"], **HERE})
    )
    server.run(workflow)


def test_status_tells_how_to_get_a_daemon(server: ComfyServer) -> None:
    begin = time.monotonic()
    entry = server.run({"status": {"class_type": "XDiTStatus", "inputs": {}}})
    (text,) = entry["outputs"]["status"]["text"]
    assert "no xdit-sidecar daemon answers" in text
    assert_helps(text)
    assert time.monotonic() - begin < 5.0


def test_loader_tells_that_the_daemon_has_no_ranks(tmp_path: Path) -> None:
    workflow = {
        "loader": {"class_type": "XDiTUNetLoader", "inputs": dict(LOADER)},
        "report": {
            "class_type": "TestReportParameters",
            "inputs": {"model": ["loader", 0], "load": False},
        },
    }
    with running_daemon(tmp_path) as daemon:
        server = ComfyServer(
            tmp_path / "base",
            packs={PACK: packs.clone()},
            environment={"XDIT_SIDECAR_RUNTIME_DIR": str(daemon.runtime_dir)},
        )
        with server:
            assert f"xDiT: the daemon's sockets are in {daemon.runtime_dir}" in server.log
            with pytest.raises(WorkflowFailed, match=r"has no ranks.*xdit-sidecar serve"):
                server.run(workflow)


# --- more than one


def other_version(directory: Path, version: str, protocol: str) -> Path:
    """A package of this project with other numbers, as pip would have installed it."""
    folder = packs.installed(directory)
    init, numbers = folder / "__init__.py", folder / "protocol/version.py"
    own = re.search(r'__version__ = "(.+)"', init.read_text())
    assert own
    init.write_text(init.read_text().replace(own[1], version))
    numbers.write_text(
        re.sub(
            r"(PROTOCOL_VERSION = ProtocolVersion)\(.*\)", rf"\1({protocol})", numbers.read_text()
        )
    )
    return folder


def test_installed_package_goes_first_and_a_second_copy_last(tmp_path: Path) -> None:
    folder = other_version(tmp_path / "wheel", "9.9.9", "2, 0")
    server = ComfyServer(
        tmp_path / "base",
        arguments=whitelist(PACK, "xdit-sidecar"),
        environment={
            "PYTHONPATH": str(folder.parent),
            "XDIT_SIDECAR_RUNTIME_DIR": str(tmp_path / "run"),
        },
    )
    page = folder / "comfy_client_node" / "web" / "docs" / "XDiTStatus.md"
    page.write_text("of 9.9.9")
    other = installed(server, "xdit-sidecar")
    copy = server.base / "custom_nodes" / PACK
    shutil.copytree(other, copy)
    with server:
        log = server.log
        assert log.count(f"xDiT: the nodes of {folder} (9.9.9)") == 1
        (warning,) = (line for line in log.splitlines() if "xDiT: two versions" in line)
        assert f"They speak different protocols, {PROTOCOL_VERSION} and 2.0" in warning
        assert f"{sys.executable} -m pip uninstall xdit-sidecar" in warning
        # ComfyUI takes them in the order of the disk.
        (refusal,) = (line for line in log.splitlines() if "custom_nodes twice" in line)
        named = [str(path) for path in (copy, other)]
        first, second = sorted(named, key=lambda name: refusal.index(f"{name} ("))
        assert f"{second} ({project_version()}) registers nothing" in refusal
        assert re.search(rf"IMPORT FAILED\): {re.escape(second)}$", log, re.MULTILINE)
        assert log.count("xDiT: no daemon in ") == 1
        modules = {server.object_info(name)["python_module"] for name in NODES}
        assert modules == {f"custom_nodes.{Path(first).name}"}
        # Browsers get the scripts and the help once, from the package whose nodes are used.
        answers = [
            server.request("GET", f"/extensions/{Path(path).name}/docs/XDiTStatus.md")
            for path in (first, second)
        ]
        assert answers[0] == (200, b"of 9.9.9")
        assert answers[1][0] == 404
        scripts = [path for path in server.get("/extensions") if "xdit" in path]
        assert not [path for path in scripts if f"/{Path(second).name}/" in path]


def project_version() -> str:
    return str(import_root()["__version__"])


def import_root() -> dict[str, str]:
    text = (project.ROOT / "__init__.py").read_text()
    return dict(re.findall(r'^(\w+) = "(.+)"$', text, re.MULTILINE))


AS_COMFYUI = """
import importlib.util, logging, sys
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
path = sys.argv[1]
name = path.replace(".", "_x_")
spec = importlib.util.spec_from_file_location(name, path + "/__init__.py")
module = sys.modules[name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
from importlib import import_module
found = import_module(name + ".comfy_client_node.one_pack").find_installed(module)
print("used:", None if found is None else found.__file__)
print("web:", module.WEB_DIRECTORY)
print("torch" in sys.modules, "zmq" in sys.modules)
"""


def find_installed(pack: Path, site: Path | None) -> str:
    """What a pack says that ComfyUI imports from ``pack``, with ``site`` in the environment."""
    program = (
        AS_COMFYUI if site is None else f"import sys; sys.path[:0] = [{str(site)!r}]\n{AS_COMFYUI}"
    )
    flags = ["-S"] if site is None else []
    done = subprocess.run(
        [sys.executable, *flags, "-c", program, str(pack)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_other_versions_of_one_protocol(tmp_path: Path) -> None:
    same = packs.installed(tmp_path / "same")
    newer = other_version(tmp_path / "newer", "9.9.9", "1, 7")
    pack = tmp_path / "custom_nodes" / PACK
    shutil.copytree(same, pack)

    said = find_installed(pack, newer.parent)
    assert "two versions of xdit-sidecar" in said
    assert "different protocols" not in said
    assert f"used: {newer}/__init__.py" in said
    assert f"web: {newer}/comfy_client_node/web" in said
    said = find_installed(pack, same.parent)
    assert "two versions" not in said
    assert f"used: {same}/__init__.py" in said
    # A link into the environment itself, and an environment without the package.
    assert "used: None" in find_installed(same, same.parent)
    said = find_installed(pack, None)
    assert "used: None" in said
    assert "web: ./comfy_client_node/web" in said
    assert "False False" in said


# --- for ComfyUI's registry


def test_registry_configuration(tmp_path: Path) -> None:
    program = (
        "import json, sys; sys.path.insert(0, sys.argv[1])\n"
        "from comfy_config.config_parser import extract_node_configuration\n"
        "print(extract_node_configuration(sys.argv[2]).model_dump_json())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(comfyui()), str(project.ROOT)],
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    assert found["project"]["name"] == "xdit-sidecar"
    assert "comfyui" not in found["project"]["name"]
    assert found["project"]["supported_os"] == ["POSIX :: Linux"]
    assert found["project"]["supported_accelerators"] == ["GPU :: NVIDIA CUDA"]
    assert found["project"]["supported_comfyui_version"] == ">=0.3.75"
    assert found["tool_comfy"]["publisher_id"] == "xdit-sidecar"
    assert found["tool_comfy"]["display_name"] == "xDiT Sidecar"
    # Served once, by WEB_DIRECTORY.
    assert not found["tool_comfy"]["web"]
    described = project.pyproject()
    where = project.ROOT / described["tool"]["comfy"]["version"]["path"]
    assert re.search(r'^__version__ = "\d+\.\d+\.\d+"$', where.read_text(), re.MULTILINE)
