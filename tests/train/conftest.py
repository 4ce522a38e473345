"""What tests of training share."""

from __future__ import annotations

from pathlib import Path

import pytest

from lvr_lite.toy.make import write_scenes


@pytest.fixture(scope="session")
def scenes_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of twelve samples with boxes, each with a picture of its own."""
    return write_scenes(tmp_path_factory.mktemp("scenes") / "made", 12, 1, "train")
