"""A process with an upload under way: begins it, says so on stdout, and holds it until killed, or told to go on.

Run as a script with the storage's class (module:name), its options as JSON, the path, how many bytes, and "claimed" for
a writer that has claimed the directory. No torch.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from contextlib import ExitStack

from storage.claimed import claimed


def main(storage_class: str, options: str, path: str, size: str, kind: str = "") -> None:
    module, name = storage_class.split(":")
    storage = getattr(importlib.import_module(module), name)(**json.loads(options))
    contents = memoryview(bytearray(int(size)))
    with ExitStack() as stack:
        if kind == "claimed":
            stack.enter_context(claimed(os.path.dirname(path)))
        upload = storage.begin(path, len(contents))
    offsets = range(0, len(contents), upload.piece_bytes)
    upload.write(0, contents[: upload.piece_bytes])
    print("holding", flush=True)
    sys.stdin.readline()
    for offset in offsets[1:]:
        upload.write(offset, contents[offset : offset + upload.piece_bytes])
    upload.sync()
    upload.commit()
    upload.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
