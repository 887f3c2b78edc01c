"""The comparison measures all of the methods, and checks what they saved."""

from __future__ import annotations

import re
from pathlib import Path

from scripts import TINY, run


def test_comparison(tmp_path: Path) -> None:
    """All four rows with figures in them, each kind of file read back in both ways, and nothing left behind."""
    output = run("compare_overhead.py", *TINY, "--rounds", "2", "--save-every", "4", cwd=tmp_path).stdout
    num_durations = {"no saving": 1, "torch.save + fsync": 4, "asyncckpt copy": 4, "asyncckpt overlap": 4}
    for title, expected in num_durations.items():
        row = re.search(rf"^ *{re.escape(title)} +(\d.*)$", output, re.MULTILINE)
        assert row is not None, output
        assert len(re.findall(r"[\d.]+ m?s\b", row[1])) == expected, output
        if title != "no saving":
            assert re.search(rf"^{re.escape(title)}, step \d+: .* agree in every tensor", output, re.MULTILINE), output
    assert "Medians over 2 rounds" in output
    assert max(map(len, output[output.index("training") :].splitlines()[:8])) <= 80
    assert list(tmp_path.iterdir()) == []
