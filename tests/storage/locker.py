"""A process that takes a directory's lock: says so on stdout, and holds it until killed, or told to end.

Run as a script with the storage's class (module:name), its options as JSON, the directory, what it says of itself, and
which child it starts meanwhile: "none", "forked" or "executed". A child lives until stdin ends. No torch.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys


def fork_child() -> int:
    started, start = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(start, b"1")
        sys.stdin.read()
        os._exit(0)
    os.read(started, 1)  # what runs in the child at fork has run
    return pid


def execute_child() -> int:
    source = "import sys; print('started', flush=True); sys.stdin.read()"
    child = subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, close_fds=False)
    assert child.stdout is not None
    child.stdout.readline()
    return child.pid


def main(storage_class: str, options: str, directory: str, holder: str, child: str) -> None:
    module, name = storage_class.split(":")
    storage = getattr(importlib.import_module(module), name)(**json.loads(options))
    lock = storage.lock(directory, holder)
    child_pid = {"none": lambda: 0, "forked": fork_child, "executed": execute_child}[child]()
    print(child_pid, flush=True)
    sys.stdin.readline()
    assert lock.is_intact()


if __name__ == "__main__":
    main(*sys.argv[1:])
