"""Links between the documents lead somewhere, and what they count up is what the code has."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import documents
import project
import pytest
from xdit_sidecar.daemon.config import KEYS, RELOADABLE, Config

# Not the template of one.
PAGES = [path for path in project.files() if path.suffix == ".md" and path.parts[0] != "tools"]


def broken(page: Path, text: str) -> list[str]:
    """Links of a page that lead nowhere in this tree."""
    found = []
    for target in documents.links(text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        place = (project.ROOT / page.parent / name).resolve() if name else None
        if place is not None and not (place.exists() and place.is_relative_to(project.ROOT)):
            found.append(target)
            continue
        aim = text if place is None else documents.read(place) if anchor else ""
        if anchor and anchor not in documents.anchors(aim):
            found.append(target)
    return found


def test_links_lead_somewhere() -> None:
    found = {str(page): broken(page, documents.read(page)) for page in PAGES}
    assert any(documents.links(documents.read(page)) for page in PAGES)
    assert not {page: links for page, links in found.items() if links}


def test_broken_links_are_noticed() -> None:
    text = "# One\n[a](#one) [b](#two) [c](docs/none.md) [d](README.md#nowhere) `[e](code)`\n"
    assert broken(Path("page.md"), text) == ["#two", "docs/none.md", "README.md#nowhere"]


def test_names_of_files_in_sentences_are_right() -> None:
    for page in documents.documents():
        for code in documents.inline_code(documents.read(page)):
            if re.fullmatch(
                r"(docs|tests|tools|benchmarks|examples|systemd|protocol|daemon)/\S*", code
            ):
                names = [code.rstrip("/")]
                if found := re.fullmatch(r"(.*)\{(.*)\}(.*)", code):
                    names = [f"{found[1]}{name}{found[3]}" for name in found[2].split(",")]
                for name in names:
                    assert list(project.ROOT.glob(name)), f"{page}: {code}"


def test_the_architecture_names_who_imports_torch() -> None:
    text = documents.read("docs/architecture.md")
    sentence = text[text.index("Elsewhere only these do") :].partition("Tests compare")[0]
    free = (Path("daemon/ranks"), Path("comfy_client_node"))
    importing = {
        str(path)
        for path in project.package_files()
        if not any(folder in path.parents for folder in free)
        and _imports_torch(ast.parse(documents.read(path)))
    }
    assert set(re.findall(r"`([^`]+)`", sentence)) == importing


def _imports_torch(tree: ast.AST) -> bool:
    """Whether code does that runs; what is for type checkers only does not."""
    if isinstance(tree, ast.If) and ast.unparse(tree.test) == "TYPE_CHECKING":
        return any(_imports_torch(node) for node in tree.orelse)
    if isinstance(tree, ast.Import):
        return any(alias.name.split(".")[0] == "torch" for alias in tree.names)
    if isinstance(tree, ast.ImportFrom):
        return not tree.level and (tree.module or "").split(".")[0] == "torch"
    return any(_imports_torch(node) for node in ast.iter_child_nodes(tree))


def test_every_setting_is_in_operations() -> None:
    text = documents.read("docs/operations.md").partition("## Configuration")[2]
    table = text[text.index("| key |") :].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    keys = {key.strip("`"): cells for key, *cells in rows}
    assert set(keys) == set(KEYS)
    assert {key for key, (_, reload, _) in keys.items() if reload == "yes"} == RELOADABLE
    defaults = Config()
    for key in ("device", "ranks", "deadline", "idle", "log-level"):
        default = getattr(defaults, key.replace("-", "_"))
        written = keys[key][0].strip("`")
        assert written == (f"{default:g}" if isinstance(default, float) else str(default)), key
    assert keys["reserve"][0] == f"{defaults.reserve >> 20}M"


def test_the_readmes_name_every_node_as_comfyui_shows_it() -> None:
    english, chinese = (
        [node["display_name"] for node in json.loads(documents.read(path)).values()]
        for path in ("locales/en/nodeDefs.json", "locales/zh/nodeDefs.json")
    )
    assert len(english) == len(chinese) == 10
    pages = documents.read("README.md"), documents.read("README.zh.md")
    assert [name for name in english if name not in pages[0] or name not in pages[1]] == []
    assert [name for name in chinese if name not in pages[1]] == []


def test_both_readmes_have_the_same_headings_and_figures() -> None:
    english, chinese = documents.read("README.md"), documents.read("README.zh.md")

    def shape(text: str) -> list[int]:
        plain = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
        return [len(level) for level in re.findall(r"^(#+) ", plain, re.MULTILINE)]

    assert shape(english) == shape(chinese)
    assert documents.commands("README.md") == [
        documents.Command("README.md", c.text, c.output) for c in documents.commands("README.zh.md")
    ]
    rows = [re.findall(r"^\|(.*)\|$", text, re.MULTILINE) for text in (english, chinese)]
    for ours, theirs in zip(*rows, strict=True):
        assert re.findall(r"[\d.,²]*\d", ours) == re.findall(r"[\d.,²]*\d", theirs)
        # Options, symptoms and names of files are the same, too.
        assert set(re.findall(r"`[^`]+`", ours)) == set(re.findall(r"`[^`]+`", theirs))


@pytest.mark.parametrize(
    ("page", "heading"), [("README.md", "When something is wrong"), ("docs/docker.md", "Look")]
)
def test_symptoms_are_sentences_of_the_code(page: str, heading: str) -> None:
    code = "\n".join(documents.read(path) for path in project.package_files())
    code = re.sub(r'"\s*\n\s*f?"', "", code)  # sentences over several lines
    section = documents.read(page).partition(f"## {heading}\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ([^|]*) \|", section, re.MULTILINE)[2:]
    quoted = [quote for row in rows for quote in re.findall(r"`([^`]+)`", row)]
    assert len(quoted) > 4
    for quote in quoted:
        # In front of it may be the name of a check of the health-check.
        said = re.sub(r"^[a-zA-Z …-]+: (?=[…\w])", "", quote) if "docker" in page else quote
        for piece in filter(None, (part.strip() for part in said.split("…"))):
            if not piece.startswith("xdit-sidecar "):
                assert piece in code, f"nothing says {piece!r}"
