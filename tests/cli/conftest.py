"""Real directories, made by a manager."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from asyncckpt.naming import BEST_NAME
from cli.directories import BEST, files, make_directory


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("template") / "checkpoints"
    make_directory(directory)
    return directory


@pytest.fixture
def directory(template: Path, tmp_path: Path) -> Path:
    """Five checkpoints of steps 100 to 500; that of step 300 is the best, and `best_model.pt` a link to it."""
    copy = tmp_path / "checkpoints"
    shutil.copytree(template, copy)
    (copy / BEST_NAME).unlink()
    os.link(files(copy)[BEST], copy / BEST_NAME)
    return copy
