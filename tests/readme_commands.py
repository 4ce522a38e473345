"""Runs every `sh` block of README.md, line by line in an empty folder, as a new user would (`make
readme`); `console` blocks not.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def commands(readme: str) -> list[str]:
    """The lines of all `sh` blocks, with continued lines joined."""
    blocks = re.findall(r"^```sh\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)
    return [
        line
        for block in blocks
        for line in block.replace("\\\n", "").splitlines()
        if line.strip() and not line.startswith("#")
    ]


def main() -> None:
    found = commands((ROOT / "README.md").read_text())
    if len(found) < 5:
        sys.exit(f"README.md: only {len(found)} commands found in sh blocks")
    environment = os.environ | {
        "PATH": f"{ROOT / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
    }
    with tempfile.TemporaryDirectory() as folder:
        for command in found:
            began = time.time()
            done = subprocess.run(
                ["bash", "-c", command],
                cwd=folder,
                env=environment,
                check=False,
                stdin=subprocess.DEVNULL,
            )
            print(f"--- {command}: exit {done.returncode}, {time.time() - began:.1f} s", flush=True)
            if done.returncode != 0:
                sys.exit(f"README.md: `{command}` ended with exit code {done.returncode}")
    print(f"{len(found)} commands of README.md ran")


if __name__ == "__main__":
    main()
