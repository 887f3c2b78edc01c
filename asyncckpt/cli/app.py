"""The commands: each gathers plain data, then prints it as JSON or draws it.

Exit codes: 0 all is well; 1 damage or a difference was found; 2 wrong usage; 3 an error, in one line on stderr.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from typer.core import TyperGroup

from asyncckpt.cli import advice, copies, listing, upkeep, verification
from asyncckpt.cli.options import storage_options
from asyncckpt.cli.output import clean, make_console, print_json
from asyncckpt.errors import CheckpointError, CheckpointNotFoundError
from asyncckpt.paths import scheme_of
from asyncckpt.storage.places import Places, full_path
from asyncckpt.threads import logger
from asyncckpt.version import __version__

FOUND, ERROR, INTERRUPTED = 1, 3, 130

Report = TypeVar("Report")

_Directory = Annotated[str, typer.Argument(metavar="DIR", help="A directory of checkpoints, or its URL.")]
_StorageOption = Annotated[
    list[str] | None,
    typer.Option(
        "--storage-option",
        metavar="KEY=VALUE",
        help="What a URL's storage is opened with, as s3fs has it; repeatable. Secrets are better left to the "
        "environment (AWS_ACCESS_KEY_ID and so on), since others see a command's arguments.",
    ),
]
_Step = Annotated[int, typer.Argument(metavar="STEP", help="The global step of a checkpoint.")]
_Json = Annotated[bool, typer.Option("--json", help="Print strict JSON and nothing else.")]


class _Commands(TyperGroup):
    """Turns errors into one line and an exit code, and the library's log into plain lines."""

    def invoke(self, ctx: Any) -> Any:
        with _plain_log():
            try:
                return super().invoke(ctx)
            except BrokenPipeError:
                raise  # whoever read us has seen enough
            except (CheckpointError, OSError) as error:
                print(f"asyncckpt: {clean(_message(error))}", file=sys.stderr)
                raise typer.Exit(ERROR) from error
            except KeyboardInterrupt as interrupt:
                raise typer.Exit(INTERRUPTED) from interrupt


app = typer.Typer(cls=_Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"asyncckpt {__version__}")
        raise typer.Exit


@app.callback()
def asyncckpt(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Look at checkpoints, verify them, and keep their directories in order."""


@app.command("list")
def list_(directory: _Directory, storage_option: _StorageOption = None, as_json: _Json = False) -> None:
    """List a directory's checkpoints in the order of their commits, the newest last. Changes nothing."""
    with _storage(storage_option, directory) as storage:
        listed = listing.gather(storage, _existing(directory))
    _show(listed, listing.draw, as_json)


@app.command()
def inspect(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A checkpoint file, or its URL.")],
    storage_option: _StorageOption = None,
    as_json: _Json = False,
) -> None:
    """Show what a checkpoint file holds: tensors, other entries, metadata. Runs nothing that is in it."""
    from asyncckpt.cli import inspection

    with _storage(storage_option, file) as storage:
        inspected = inspection.gather(storage, _file(file))
    _show(inspected, inspection.draw, as_json)


@app.command()
def verify(
    path: Annotated[str, typer.Argument(metavar="FILE|DIR", help="A checkpoint file, or a directory; or a URL.")],
    quick: Annotated[
        bool, typer.Option("--quick", help="Trust the checksums that a store keeps, where it does; read only the rest.")
    ] = False,
    storage_option: _StorageOption = None,
    as_json: _Json = False,
) -> None:
    """Read every byte and hold it against its checksums. Exits with 1 if something is damaged."""
    with _storage(storage_option, path) as storage:
        verified = verification.gather(storage, _file(path), is_quick=quick)
    _show(verified, verification.draw, as_json)
    if not verified.ok:
        raise typer.Exit(FOUND)


@app.command()
def prune(
    directory: _Directory,
    keep_last: Annotated[int | None, typer.Option(min=1, help="Keep this many of the newest.")] = None,
    keep_best: Annotated[int | None, typer.Option(min=1, help="Keep this many of the best.")] = None,
    keep_every: Annotated[int | None, typer.Option(min=1, help="Keep one for every so many steps.")] = None,
    keep_every_epochs: Annotated[int | None, typer.Option(min=1, help="Keep one for every so many epochs.")] = None,
    keep_every_hours: Annotated[float | None, typer.Option(help="Keep one for every so many hours.")] = None,
    metric: Annotated[str | None, typer.Option(help="What is best; else what the directory monitors.")] = None,
    mode: Annotated[str | None, typer.Option(help="Whether the best is the min or the max.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be deleted.")] = False,
    storage_option: _StorageOption = None,
    as_json: _Json = False,
) -> None:
    """Delete the checkpoints that no --keep option keeps. The newest and the best one always stay."""
    with _storage(storage_option, directory) as storage:
        directory = _existing(directory)
        with _usage_errors():
            keep = upkeep.Keep(keep_last, keep_best, keep_every, keep_every_epochs, keep_every_hours, metric, mode)
            policy = upkeep.find_policy(storage, directory, keep)
        pruned = upkeep.prune(storage, directory, policy, dry_run=dry_run)
    _show(pruned, upkeep.draw_pruned, as_json)
    if pruned.not_deleted:
        raise typer.Exit(ERROR)


@app.command()
def repair(directory: _Directory, storage_option: _StorageOption = None, as_json: _Json = False) -> None:
    """Make a directory agree with itself after a crash, as the next save would. Says everything that it does."""
    with _storage(storage_option, directory) as storage:
        repaired = upkeep.repair(storage, _existing(directory))
    _show(repaired, upkeep.draw_repaired, as_json)


@app.command()
def pin(directory: _Directory, step: _Step, storage_option: _StorageOption = None, as_json: _Json = False) -> None:
    """Keep the newest checkpoint of a step, whatever retention and prune say, until it is unpinned."""
    with _storage(storage_option, directory) as storage:
        pinned = upkeep.pin(storage, _existing(directory), step, is_pinned=True)
    _show(pinned, upkeep.draw_pinned, as_json)


@app.command()
def unpin(directory: _Directory, step: _Step, storage_option: _StorageOption = None, as_json: _Json = False) -> None:
    """Leave the checkpoints of a step to retention again."""
    with _storage(storage_option, directory) as storage:
        unpinned = upkeep.pin(storage, _existing(directory), step, is_pinned=False)
    _show(unpinned, upkeep.draw_pinned, as_json)


@app.command()
def copy(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A checkpoint file, or a directory; or a URL.")],
    destination: Annotated[str, typer.Argument(metavar="DST", help="Where it is to go; a path or a URL.")],
    storage_option: _StorageOption = None,
    as_json: _Json = False,
) -> None:
    """Copy a checkpoint, or a directory of them, checking every byte; what is there already is not copied again.

    Nothing is deleted, and nothing overwritten but a damaged copy of the same checkpoint; no retention is applied.
    Exits with 1 if something is damaged.
    """
    with _storage(storage_option, source, destination) as storage:
        if not destination:
            raise typer.BadParameter("a path can't be empty")
        copied = copies.gather(storage, _file(source), destination)
    _show(copied, copies.draw, as_json)
    if not copied.ok:
        raise typer.Exit(FOUND)


@app.command()
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="A checkpoint file, or its URL.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another one.")],
    storage_option: _StorageOption = None,
    as_json: _Json = False,
) -> None:
    """Show which entries of two checkpoints differ, and by how much. Exits with 1 if any do."""
    from asyncckpt.cli import difference

    with _storage(storage_option, a, b) as storage:
        compared = difference.gather(storage, _file(a), _file(b))
    _show(compared, difference.draw, as_json)
    if not compared.equal:
        raise typer.Exit(FOUND)


@app.command()
def interval(
    save_secs: Annotated[float, typer.Option(help="What one save takes from training, in seconds.")],
    mtbf_hours: Annotated[float | None, typer.Option(help="Mean time between failures of the whole job.")] = None,
    total_hours: Annotated[float | None, typer.Option(help="How long the training takes.")] = None,
    failure_probability: Annotated[float | None, typer.Option(help="Failures expected in that time.")] = None,
    write_secs: Annotated[float, typer.Option(help="How long until a save is durable.")] = 0.0,
    max_overhead: Annotated[float | None, typer.Option(help="The most that saving may take, as a fraction.")] = None,
    as_json: _Json = False,
) -> None:
    """Work out how often to save: by three formulas, with what each costs."""
    with _usage_errors():
        report = advice.gather(save_secs, mtbf_hours, total_hours, failure_probability, write_secs, max_overhead)
    _show(report, advice.draw, as_json)


@app.command()
def doctor(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="Where checkpoints are to be saved; or a URL.")] = ".",
    storage_option: _StorageOption = None,
    as_json: _Json = False,
) -> None:
    """Say what a directory and this machine can do, and what to change. Exits with 1 if checkpoints are not safe."""
    from asyncckpt.cli import diagnosis

    with _storage(storage_option, directory) as storage:
        examination = diagnosis.gather(storage, _file(directory))
    _show(examination, diagnosis.draw, as_json)
    if not examination.ok:
        raise typer.Exit(FOUND)


@app.command()
def run() -> None:
    """Run a training command as a container's first process: it ends when the last checkpoint is written."""
    raise AssertionError("unreachable")  # `__main__` sees to it before typer is imported; this is for --help


def _show(report: Report, draw: Callable[[Report, Console], None], as_json: bool) -> None:
    if as_json:
        print_json(report)
    else:
        draw(report, make_console())


@contextmanager
def _storage(options: list[str] | None, *paths: str) -> Iterator[Places]:
    """Every storage, opened with these options; an error that does not say where it happened names the paths."""
    with _usage_errors():
        places = Places(storage_options(options or ()))
    try:
        yield places
    except OSError as error:
        if error.filename is None and not isinstance(error, CheckpointError):
            error.filename = " or ".join(paths)
        raise


def _existing(directory: str) -> str:
    """In a store a directory is there as soon as it is written to."""
    if directory and scheme_of(full := full_path(directory)):
        return full
    if not os.path.isdir(directory):
        what = "is not a directory" if os.path.exists(directory) else "does not exist"
        raise CheckpointNotFoundError(f"{directory} {what}")
    return directory


def _file(path: str) -> str:
    """Without the slash that shells add to what turns out to be a directory."""
    if not path:
        raise typer.BadParameter("a path can't be empty")
    if scheme_of(full := full_path(path)):
        return full
    return path.rstrip(os.sep) or f"{os.sep}."


@contextmanager
def _usage_errors() -> Iterator[None]:
    """A policy or a formula refused a number: that is the user's to mend."""
    try:
        yield
    except CheckpointError:
        raise
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and not isinstance(error, CheckpointError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


class _PlainLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return f"asyncckpt: {clean(record.getMessage())}"


@contextmanager
def _plain_log() -> Iterator[None]:
    """The library's warnings on stderr, a line each; not a second time through anybody's root logger."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_PlainLines())
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
