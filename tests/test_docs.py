"""What the documents name exists."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_failure_model_names_real_tests() -> None:
    """Every row of its tables names tests, or files of tests, that are there."""
    text = (ROOT / "docs" / "failure-model.md").read_text()
    files = {path.name: path.read_text() for path in (ROOT / "tests").rglob("*.py")}
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("|---")]
    for row in rows:
        shown_by = row.rstrip(" |").rsplit(" | ", 1)[1]
        names = re.findall(r"`(test_\w+(?:\.py)?)`", shown_by)
        assert names or shown_by == "shown by", row
        for name in names:
            assert name in files or any(f"def {name}(" in source for source in files.values()), name
