"""The project's documents, and what in them can be checked: commands, links, headings."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import project

PROSE = {"text", "yaml", "python"}  # languages of blocks that are no commands
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_ASSIGNMENT = re.compile(r"[A-Z_]+=.*")


@dataclass(frozen=True)
class Command:
    """One command of a fenced block, and what the document says that it prints."""

    document: str
    text: str  # as written, in one line and without a comment
    output: str | None = None  # None: nothing is said

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text)

    @property
    def environment(self) -> dict[str, str]:
        """Variables that are set in front of the program."""
        found = {}
        for word in self.words:
            if not _ASSIGNMENT.fullmatch(word):
                break
            name, _, value = word.partition("=")
            found[name] = value
        return found

    @property
    def program(self) -> str:
        """The program's name, without its folder."""
        return Path(self.words[len(self.environment)]).name

    @property
    def arguments(self) -> list[str]:
        return self.words[len(self.environment) + 1 :]


def documents() -> list[Path]:
    """Those that people read, relative to the root."""
    top = {"README.md", "README.zh.md", "CONTRIBUTING.md", "CHANGELOG.md"}
    top.add("examples/digits/README.md")
    return [
        path
        for path in project.files()
        if path.suffix == ".md" and (str(path) in top or path.parts[0] == "docs")
    ]


def read(document: Path | str) -> str:
    return (project.ROOT / document).read_text("utf-8")


def blocks(text: str, *languages: str) -> list[str]:
    """The fenced blocks in one of these languages."""
    return [found[2] for found in _FENCE.finditer(text) if found[1] in languages]


def commands(document: Path | str, text: str | None = None) -> list[Command]:
    """The commands of all fenced blocks, in their order."""
    found: list[Command] = []
    for match in _FENCE.finditer(read(document) if text is None else text):
        if match[1] not in PROSE:
            found += _commands_of(str(document), match[2].replace("\\\n", ""))
    return found


def _commands_of(document: str, block: str) -> Iterator[Command]:
    if not re.search(r"^\$ ", block, re.MULTILINE):
        for line in block.splitlines():
            for text in _split(line):
                yield Command(document, text)
        return
    for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        line, _, output = part.partition("\n")
        yield Command(document, " ".join(shlex.split(line, posix=False)), output)


def _split(line: str) -> Iterator[str]:
    """The simple commands of a line: what `&&` joins, also inside of `sudo` and `sh -c`."""
    line = re.sub(r"(^|\s+)#\s.*", "", line).strip()
    for piece in re.split(r"\s+&&\s+(?![^']*'$)", line) if line else []:
        piece = piece.removeprefix("sudo ")
        if inner := re.fullmatch(r"sh -c '(.*)'", piece):
            yield from _split(inner[1])
        elif piece:
            yield re.sub(r"\s+>\s+\S+$", "", piece)


def inline_code(text: str) -> list[str]:
    """Everything in `backticks` outside of fenced blocks."""
    plain = _FENCE.sub("", text).replace("\\|", "|")  # as tables need it
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", plain)


def links(text: str) -> list[str]:
    """Targets of links and pictures."""
    plain = re.sub(r"`[^`\n]*`", "", _FENCE.sub("", text))
    return re.findall(r"\]\(([^)\s]+)\)", plain)


def anchors(text: str) -> set[str]:
    """What headings can be linked by, as GitHub names them."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
