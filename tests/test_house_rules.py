"""Promises about the source: no code from bytes, torch only where it may be, a clean wheel."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import project
import pytest

LONGEST_FILE = 500  # lines

UNSAFE_MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve"}
UNSAFE_BUILTINS = {"eval", "exec", "compile"}
UNSAFE_METHODS = {
    "recv_pyobj",
    "send_pyobj",
    # torch.distributed pickles what goes through these
    "all_gather_object",
    "broadcast_object_list",
    "gather_object",
    "recv_object_list",
    "scatter_object_list",
    "send_object_list",
}
UNSAFE_ATTRIBUTES = {
    ("torch", "load"),
    ("torch", "save"),
    ("yaml", "load"),
    ("yaml", "unsafe_load"),
    ("builtins", "eval"),
    ("builtins", "exec"),
    ("builtins", "compile"),
}


def unsafe_parts(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, what) of everything that could turn foreign bytes into running code."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if UNSAFE_MODULES & set(alias.name.split(".")):
                    yield node.lineno, f"import {alias.name}"
        elif isinstance(node, ast.ImportFrom) and not node.level:
            module = node.module or ""
            if UNSAFE_MODULES & set(module.split(".")):
                yield node.lineno, f"from {module} import …"
            for alias in node.names:
                if (module, alias.name) in UNSAFE_ATTRIBUTES:
                    yield node.lineno, f"from {module} import {alias.name}"
        elif isinstance(node, ast.Name) and node.id in UNSAFE_BUILTINS:
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute):
            owner = node.value.id if isinstance(node.value, ast.Name) else ""
            if node.attr in UNSAFE_METHODS or (owner, node.attr) in UNSAFE_ATTRIBUTES:
                yield node.lineno, f"{owner}.{node.attr}"


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, module) of every absolute import, at whatever depth."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.lineno, node.module or ""


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse((project.ROOT / path).read_text(), filename=str(path))


def run_python(code: str, *flags: str) -> str:
    answer = subprocess.run(
        [sys.executable, *flags, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=project.ROOT.anchor,
    )
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import os, marshal as m",
        "from shelve import open",
        "from cloudpickle.cloudpickle import dumps",
        "def f():\n    import dill",
        "eval('1')",
        "run = exec",
        "compile('1', '', 'eval')",
        "socket.recv_pyobj()",
        "self.socket.send_pyobj(1)",
        "torch.load('x')",
        "from torch import load",
        "yaml.load(text)",
        "dist.broadcast_object_list(things)",
    ],
)
def test_unsafe_code_is_recognised(source: str) -> None:
    assert list(unsafe_parts(ast.parse(source)))


@pytest.mark.parametrize(
    "source",
    [
        "re.compile('a')",
        "torch.compile(model)",
        "model.eval()",
        "await create_subprocess_exec('true')",
        "safetensors.torch.load(data)",
        "from .pickle import word",
        "yaml.safe_load(text)",
    ],
)
def test_safe_code_is_left_alone(source: str) -> None:
    assert not list(unsafe_parts(ast.parse(source)))


def test_package_has_no_unsafe_code() -> None:
    found = [
        f"{path}:{line}: {what}"
        for path in project.package_files()
        for line, what in unsafe_parts(parse(path))
    ]
    assert not found, "\n".join(found)


def test_package_imports_itself_relatively() -> None:
    # A clone in custom_nodes/ has another name than xdit_sidecar.
    found = [
        f"{path}:{line}: {module}"
        for path in project.package_files()
        for line, module in imports(parse(path))
        if module.split(".")[0] == project.PACKAGE
    ]
    assert not found, "\n".join(found)


def test_files_stay_short() -> None:
    lengths = {
        path: len((project.ROOT / path).read_text().splitlines())
        for path in project.package_files()
    }
    too_long = {str(path): lines for path, lines in lengths.items() if lines > LONGEST_FILE}
    assert not too_long, f"more than {LONGEST_FILE} lines: {too_long}"


def test_pyproject_lists_every_package() -> None:
    listed = project.pyproject()["tool"]["setuptools"]["packages"]
    assert len(listed) == len(set(listed))
    assert set(listed) == project.packages_on_disk()


def test_every_folder_with_code_is_a_package() -> None:
    # Without an __init__.py, setuptools would leave the folder out of the wheel.
    folders = {path.parent for path in project.package_files()}
    missing = sorted(str(f) for f in folders if not (project.ROOT / f / "__init__.py").exists())
    assert not missing, f"no __init__.py in {missing}"


def test_broker_and_keeper_never_name_torch() -> None:
    found = [
        f"{path}:{line}: {module}"
        for path in project.package_files()
        if path.parts[:2] in {("daemon", "broker"), ("daemon", "keeper")}
        for line, module in imports(parse(path))
        if module.split(".")[0] in {"torch", "numpy", "xfuser", "diffusers", "transformers"}
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("package", ["protocol", "daemon"])
def test_importing_brings_in_no_torch(package: str) -> None:
    ranks = f"{project.PACKAGE}.daemon.ranks."
    below = project.modules_below(f"{project.PACKAGE}.{package}")
    modules = [name for name in below if not name.startswith(ranks)]
    assert modules, "no modules found"
    code = f"""
import importlib, sys
for name in {modules}:
    importlib.import_module(name)
    heavy = {{"torch", "numpy"}} & set(sys.modules)
    if heavy:
        sys.exit(f"importing {{name}} imports {{heavy}}")
"""
    run_python(code)


def test_root_imports_without_anything_installed() -> None:
    code = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location(
    "custom_nodes_clone", {str(project.ROOT / "__init__.py")!r},
    submodule_search_locations=[{str(project.ROOT)!r}],
)
module = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = module
spec.loader.exec_module(module)
print(module.__version__)
"""
    assert run_python(code, "-I", "-S").strip() == root_version()


def root_version() -> str:
    text = (project.ROOT / "__init__.py").read_text()
    found = re.findall(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    assert len(found) == 1
    return str(found[0])


def test_version_has_one_source() -> None:
    described = project.pyproject()
    assert "version" not in described["project"]
    assert described["project"]["dynamic"] == ["version"]
    assert described["tool"]["setuptools"]["dynamic"]["version"] == {
        "attr": f"{project.PACKAGE}.__version__"
    }


def test_tested_versions_cover_the_dependencies() -> None:
    described = project.pyproject()["project"]
    required = [*described["dependencies"]]
    for extra in described["optional-dependencies"].values():
        required += extra
    names = {re.split(r"[<>=!~\[; ]", line, maxsplit=1)[0] for line in required}
    lines = (project.ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0] for line in lines if line and not line.startswith("#")}
    assert names - {"xdit-sidecar"} <= pinned


def test_wheel_has_the_package_and_nothing_else(tmp_path: Path) -> None:
    source = project.copy_to(tmp_path / "clone")
    build = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index"),
            *("--no-build-isolation", "--disable-pip-version-check"),
            *("-w", str(tmp_path), str(source)),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert build.returncode == 0, build.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"xdit_sidecar-{root_version()}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(f"xdit_sidecar-{root_version()}.dist-info/METADATA").decode()
    info = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    expected = {f"{project.PACKAGE}/{path}" for path in project.package_files()}
    expected |= {f"{project.PACKAGE}/{path}" for path in project.data_files()}
    assert names - info == expected
    assert any(name.endswith("/LICENSE") for name in info)
    assert not [name for name in names if "test" in name]
    assert f"Version: {root_version()}\n" in metadata
    assert "License-Expression: Apache-2.0\n" in metadata


def lines_with(pattern: re.Pattern[str]) -> str:
    """Of all texts in the repository."""
    found = []
    for path in project.files():
        try:
            text = (project.ROOT / path).read_text()
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            if pattern.search(line):
                found.append(f"{path}:{number}: {line.strip()}")
    return "\n".join(found)


def test_no_text_names_a_path_of_some_machine() -> None:
    # Put together here, or this file would find itself.
    roots = "|".join(("wo" + "rk", "fa" + "rm", "ro" + "ot"))
    found = lines_with(re.compile(rf"(?<![\w.$~}}])/({roots})/"))
    assert not found, found


def test_no_text_promises_an_install_from_an_index() -> None:
    """The package is on none: pip installs it from a clone."""
    found = lines_with(re.compile(r"pip install( -\S+)* ['\"]?xdit[-_]sidecar|sidecar\[daemon"))
    assert not found, found
