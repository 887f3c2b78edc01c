"""A process that saves to a store, each step once, and says `ack STEP` on stdout when it is durable.

Run as a script with the store's endpoint and the directory's URL.
"""

from __future__ import annotations

import sys

import pytest
from storage.s3_server import S3Server

from reliability import test_object_store as gate


def main(endpoint: str, url: str) -> None:
    gate.make_quick(pytest.MonkeyPatch())
    training = gate.Training()
    with gate.manager_of(url, S3Server(endpoint)) as manager:
        for step, loss in enumerate(gate.LOSSES, 1):
            if training.save(manager, step, loss) is None:
                print(f"ack {step}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
