"""The commands that the README and those of the examples tell people to type."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RECIPES = sorted((ROOT / "examples").glob("*/README.md"))


@dataclass(frozen=True)
class Command:
    """A command of a document, as it is typed.

    Attributes:
        document: the file that it stands in.
        tool: `fairseq-train` and the like, ours among them, or the path of a Python script of the project.
        arguments: what follows.
    """

    document: Path
    tool: str
    arguments: tuple[str, ...]

    def __str__(self) -> str:
        folder = self.document.parent
        place = "" if folder == ROOT else f"{folder.name}: "
        return (
            f"{place}{Path(self.tool).name} {self.value('--save-dir') or self.value('--path') or ''}".strip()
        )

    def value(self, option: str) -> str | None:
        """What follows `option`, the last time that it is given."""
        places = [i for i, argument in enumerate(self.arguments) if argument == option]
        return self.arguments[places[-1] + 1] if places else None


def commands(document: Path) -> list[Command]:
    """Every indented command of `document` that runs a fairseq tool or a Python script of the project."""
    joined = re.sub(r" \\\n +", " ", document.read_text(encoding="utf-8"))
    tools = r"(?:fairseq-(?!hydra)|python (?:scripts|examples)/)(?!\S* \.\.\.)"
    lines = re.findall(rf"^    (?:echo .* \| )?({tools}.*)$", joined, re.MULTILINE)
    found = []
    for line in lines:
        words = shlex.split(line)
        tool = words[1] if words[0] == "python" else words[0]
        found.append(Command(document, tool, tuple(words[2 if words[0] == "python" else 1 :])))
    return found
