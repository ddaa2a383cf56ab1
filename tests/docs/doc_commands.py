"""The commands of the documentation, found and taken apart."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "examples" / "README.md"]
PAGES += sorted((ROOT / "docs").glob("*.md"))

_INLINE = re.compile(r"(?<!`)`([^`\n]*(?:\n[^`\n]+)?)`")
_WHOLE = re.compile(
    r"^(?:[A-Z_]+=\S+ )*(?:(?:python3?|torchrun|deepspeed|accelerate|mpirun|srun) .*\.py|pytest tests|slimfit-ds \w|make \w)"
)
"""What is a command in a sentence: one that names a script, and not only a launcher and its options."""


@dataclass(frozen=True)
class Command:
    """One simple command, without the variables before it."""

    words: tuple[str, ...]
    text: str
    page: str

    @property
    def program(self) -> str:
        return self.words[0]


def commands() -> list[Command]:
    """Every command in a block of the shell, and every one in a line of text that has arguments."""
    found: dict[tuple[str, str], Command] = {}
    for page in PAGES:
        if page.name == "LOG.md":  # speaks of what was
            continue
        text = page.read_text()
        blocks = re.findall(r"^```(?:bash|sh|shell|console)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
        lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
        spans = [" ".join(match.split()) for match in _INLINE.findall(prose)]
        lines += [span for span in spans if _WHOLE.match(span)]
        for line in lines:
            for command in _simple(line, page.name):
                found.setdefault((command.text, command.page), command)
    return list(found.values())


def _simple(line: str, page: str) -> list[Command]:
    """The simple commands of a line; comments, prompts, variables and redirections removed."""
    lexer = shlex.shlex(line.strip().removeprefix("$ "), posix=True, punctuation_chars="&|;<>")
    lexer.whitespace_split = True
    parts: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set("&|;"):
            parts.append([])
        else:
            parts[-1].append(word)
    result = []
    for words in parts:
        while words and re.match(r"^[A-Za-z_]\w*=", words[0]):
            words = words[1:]
        if any(set(word) <= set("<>") for word in words):
            words = words[: next(i for i, word in enumerate(words) if set(word) <= set("<>"))]
        if words:
            result.append(Command(tuple(words), " ".join(words), page))
    return result
