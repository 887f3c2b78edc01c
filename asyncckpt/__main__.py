"""The entry of the command line: `asyncckpt` and `python -m asyncckpt`."""

from __future__ import annotations

import io
import sys


def main() -> None:
    """Run the command line, and exit with its code."""
    if sys.argv[1:2] == ["run"]:  # stays in memory as long as the training
        from asyncckpt.cli import run

        sys.exit(run.main(sys.argv[2:]))
    try:
        import rich as _rich  # noqa: F401
        import typer as _typer  # noqa: F401
    except ModuleNotFoundError as error:
        print(f'asyncckpt: the command line needs {error.name}: pip install "asyncckpt[cli]"', file=sys.stderr)
        sys.exit(3)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # not every locale has a star
    from asyncckpt.cli.app import app

    app(prog_name="asyncckpt")


if __name__ == "__main__":
    main()
