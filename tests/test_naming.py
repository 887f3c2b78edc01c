"""Names of temporary files: ours are recognised, nobody else's is, and all fit."""

from __future__ import annotations

import os

import pytest

from asyncckpt.naming import is_claimed_name, is_temporary_name, is_temporary_name_of, temporary_name

ATTEMPT = "0123456789abcdef"


@pytest.mark.parametrize(
    "name", ["a", "step100.pt", "…" * 85, "é" * 127, "a" * 255, "with\nnewline", "-", ".", "x\udcff.pt"]
)
@pytest.mark.parametrize("is_claimed", [False, True])
def test_temporary_names_are_recognised_and_fit(name: str, is_claimed: bool) -> None:
    """Whatever the name, even 255 bytes of it, the temporary one is ours and within every file system's limit, and says
    what it is to become, and whether its writer had a claim."""
    temporary = temporary_name(ATTEMPT, name, is_claimed=is_claimed)
    assert is_temporary_name(temporary)
    assert is_claimed_name(temporary) == is_claimed
    assert len(os.fsencode(temporary)) <= 143
    assert temporary != temporary_name(ATTEMPT[::-1], name, is_claimed=is_claimed)
    assert is_temporary_name_of(temporary, name)
    assert not is_temporary_name_of(temporary, f"x{name}")
    assert not is_temporary_name_of(name, name)


@pytest.mark.parametrize(
    "name",
    [
        "step100.pt",
        ".asyncckpt",
        f".asyncckpt-{ATTEMPT}.tmp",
        f".asyncckpt-{ATTEMPT[:-1]}-a.tmp",
        f".asyncckpt-{ATTEMPT}0-a.tmp",
        f".asyncckpt-{ATTEMPT.upper()}-a.tmp",
        f".asyncckpt-{ATTEMPT}-a.tmp~",
        f".asyncckpt-{ATTEMPT}-a.tmp\n",
        f"asyncckpt-{ATTEMPT}-a.tmp",
        f"x.asyncckpt-{ATTEMPT}-a.tmp",
        f".asyncckpt2-{ATTEMPT}-a.tmp",
    ],
)
def test_other_names_are_not_ours(name: str) -> None:
    """A name that only looks similar belongs to somebody else."""
    assert not is_temporary_name(name)
