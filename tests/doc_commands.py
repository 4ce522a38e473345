"""Runs every `sh` and `python` block of README.md and docs/*.md as a new user would: `make readme`.

All blocks run in one folder that is empty at first, README.md's before the others', so that a page
may use what README.md made. A `console` block is not run, and must say in its first line what it
needs (a card, a download, a clone). docs/results holds experiments of hours and is left out.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```(sh|python|console)\n(.*?)^```", re.DOTALL | re.MULTILINE)
NEEDS = re.compile(r"# needs .*\b(card|download|clone|devices)\b")


@dataclass(frozen=True)
class Block:
    """One fenced block of a page; language: sh, python or console."""

    page: str
    language: str
    text: str

    def commands(self) -> list[list[str]]:
        """What to run, one after another: shell lines (continued ones joined), or one script."""
        if self.language == "python":
            return [[sys.executable, "-c", self.text]]
        lines = self.text.replace("\\\n", "").splitlines()
        return [["bash", "-c", line] for line in lines if line.strip() and line[0] != "#"]


def blocks(root: Path) -> Iterator[Block]:
    for page in (root / "README.md", *sorted((root / "docs").glob("*.md"))):
        for language, text in BLOCK.findall(page.read_text(encoding="utf-8")):
            yield Block(page.relative_to(root).as_posix(), language, text)


def unmarked(found: list[Block]) -> list[str]:
    """Pages with a `console` block that does not say what it needs."""
    consoles = [block for block in found if block.language == "console"]
    return [block.page for block in consoles if not NEEDS.match(block.text)]


def main() -> None:
    found = list(blocks(ROOT))
    if pages := unmarked(found):
        sys.exit(f"{pages[0]}: a console block must begin with `# needs a card` or the like")
    binaries = ROOT / ".venv" / "bin"
    path = f"{binaries}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1"}
    count = 0
    with tempfile.TemporaryDirectory() as folder:
        for block in found:
            for command in block.commands() if block.language != "console" else ():
                began = time.time()
                done = subprocess.run(
                    command, cwd=folder, env=environment, check=False, stdin=subprocess.DEVNULL
                )
                line = f"{block.page}: {command[-1].strip()}"
                print(
                    f"--- {line}: exit {done.returncode}, {time.time() - began:.1f} s", flush=True
                )
                if done.returncode != 0:
                    sys.exit(f"{line}: ended with exit code {done.returncode}")
                count += 1
    if count < 20:
        sys.exit(f"only {count} commands were found in the pages")
    print(f"{count} commands of README.md and docs ran")


if __name__ == "__main__":
    main()
