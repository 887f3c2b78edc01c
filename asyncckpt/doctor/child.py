"""Another Python process, started as a writer process is: a fresh interpreter with our import path."""

from __future__ import annotations

import subprocess
import sys

from asyncckpt.service.writer_process import import_path

TIMEOUT_SECS = 30.0


def run_python(code: str, *arguments: str) -> str:
    """What `code` prints. Blocks. Raises OSError when there is no Python to run it, or it fails."""
    if not sys.executable:
        raise OSError("this program does not know its Python interpreter")
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", f"import os, sys; sys.path += {import_path()!r}; {code}", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise OSError(f"{sys.executable} did not answer within {TIMEOUT_SECS:g} s") from error
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:]
        raise OSError(f"{sys.executable} failed: {''.join(last) or f'exit code {done.returncode}'}")
    return done.stdout.strip()
