"""The pages of commands and of the Python API tell what the code tells."""

from __future__ import annotations

from pathlib import Path

import pytest

import lvr_lite
from lvr_lite.cli import reference

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.mark.parametrize(
    ("page", "made"),
    [("commands.md", reference.commands_page), ("python.md", reference.python_page)],
)
def test_a_page_is_what_the_code_says_of_itself(page: str, made: object) -> None:
    assert callable(made)
    written = (DOCS / page).read_text(encoding="utf-8")
    assert written == made(), f"docs/{page} is old: `make reference` writes it anew"


def test_every_command_and_every_public_name_has_an_entry() -> None:
    commands = reference.commands_page()
    for name in ("finetune", "bench compare", "data convert", "doctor"):
        assert f"## lvr-lite {name}\n" in commands
    for name in lvr_lite.__all__:
        assert (
            f"### `{name}" in reference.python_page() or f"class {name}" in reference.python_page()
        )
