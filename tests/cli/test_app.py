"""What all commands have in common: exit codes, one line of error, no torch where none is needed."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import asyncckpt
from asyncckpt.cli import listing
from asyncckpt.cli.output import to_plain
from asyncckpt.storage.base import Storage
from cli.directories import files
from cli.running import error_of, run, run_json

# Runs the command line as `python -m asyncckpt` does, after `before`, and then says whether torch was imported.
_DRIVER = """
import sys
{before}
sys.argv = ["asyncckpt", *sys.argv[1:]]
from asyncckpt.__main__ import main
try:
    main()
finally:
    print("torch" in sys.modules, file=sys.stderr)
"""


def drive(*arguments: object, before: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", _DRIVER.format(before=before), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    ("arguments", "needs_torch"),
    [
        (["list", "DIR"], False),
        (["verify", "DIR"], False),
        (["verify", "FILE"], False),
        (["prune", "DIR", "--keep-last", "1"], False),
        (["repair", "DIR"], False),
        (["interval", "--save-secs", "1", "--mtbf-hours", "1"], False),
        (["--help"], False),
        (["inspect", "FILE"], True),
    ],
    ids=lambda value: value[0] + value[-1] if isinstance(value, list) else None,
)
def test_torch_is_imported_only_where_it_is_needed(
    directory: Path, arguments: Sequence[str], needs_torch: bool
) -> None:
    """So that the rest starts fast."""
    places = {"DIR": directory, "FILE": files(directory)[0]}
    done = drive(*(places.get(argument, argument) for argument in arguments))
    assert done.returncode == 0
    assert done.stderr == f"{needs_torch}\n"


@pytest.mark.parametrize("module", ["typer", "rich"])
def test_without_its_extra_it_says_how_to_install_it(module: str) -> None:
    """In one line, with exit code 3."""
    done = drive("list", ".", before=f"sys.modules[{module!r}] = None")
    assert done.returncode == 3
    assert done.stdout == ""
    line = f'asyncckpt: the command line needs {module}: pip install "asyncckpt[cli]"'
    assert done.stderr.splitlines() == [line, "False"]


def test_a_locale_without_stars(directory: Path) -> None:
    """Loses the star, and nothing else."""
    command = [sys.executable, "-m", "asyncckpt", "list", str(directory)]
    environment = {"PYTHONIOENCODING": "ascii", "PATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert files(directory)[0].name in done.stdout


def test_version() -> None:
    """The package's own."""
    assert run("--version").stdout == f"asyncckpt {asyncckpt.__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [[], ["unknown"], ["list"], ["list", "a", "b"], ["verify", ""], ["inspect", ""], ["diff", "a"], ["list", "--no"]],
)
def test_wrong_usage(arguments: Sequence[str]) -> None:
    """Exit code 2."""
    run(*arguments, code=2)


@pytest.mark.parametrize("command", ["list", "verify", "inspect", "repair"])
def test_an_error_is_one_line(tmp_path: Path, command: str) -> None:
    """Whatever is in the path, and without markup or control characters."""
    error = error_of(command, tmp_path / "[red]no\nwhere\x1b[31m")
    assert error.startswith("asyncckpt: ")
    assert r"[red]no\nwhere\x1b[31m" in error


def test_an_error_of_the_system_names_the_file(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the system tells it."""

    def refuse(storage: Storage, directory: str) -> None:
        raise PermissionError(13, "Permission denied", directory)

    monkeypatch.setattr(listing, "gather", refuse)
    assert error_of("list", directory) == f"asyncckpt: {directory}: Permission denied"


def test_an_interrupt_is_no_finding(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C exits with 130, not with 1."""

    def interrupt(storage: Storage, directory: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(listing, "gather", interrupt)
    run("list", directory, code=130)


def test_warnings_of_the_library_are_plain_lines(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On stderr, so that stdout stays JSON; and the logger is left as it was."""
    logger = logging.getLogger("asyncckpt")
    handlers = list(logger.handlers)
    gather = listing.gather

    def warn(storage: Storage, directory: str) -> listing.Listed:
        logger.warning("look\n%s", "\x1b[31mhere")
        logger.info("never mind")
        return gather(storage, directory)

    monkeypatch.setattr(listing, "gather", warn)
    assert run("list", directory).stderr == "asyncckpt: look\\n\\x1b[31mhere\n"
    run_json("list", directory)
    run("repair", directory)
    assert (logger.handlers, logger.propagate, logger.level) == (handlers, True, logging.NOTSET)


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (float("nan"), "NaN"),
        (float("inf"), "Infinity"),
        (float("-inf"), "-Infinity"),
        (Path("a/b"), "a/b"),
        ({1: (1, 2.5, None, True)}, {"1": [1, 2.5, None, True]}),
    ],
)
def test_plain_data(value: object, plain: object) -> None:
    """What JSON has no word for."""
    assert to_plain(value) == plain
