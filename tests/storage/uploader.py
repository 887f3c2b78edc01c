"""A process with an upload under way: begins it, says so on stdout, and holds it until killed, or told to go on.

Run as a script with the storage's class (module:name), its options as JSON, and the path. No torch.
"""

from __future__ import annotations

import importlib
import json
import sys


def main(storage_class: str, options: str, path: str) -> None:
    module, name = storage_class.split(":")
    storage = getattr(importlib.import_module(module), name)(**json.loads(options))
    upload = storage.begin(path, 8192)
    upload.write(0, memoryview(bytearray(8192)))
    print("holding", flush=True)
    sys.stdin.readline()
    upload.sync()
    upload.commit()


if __name__ == "__main__":
    main(*sys.argv[1:])
