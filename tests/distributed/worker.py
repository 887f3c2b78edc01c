"""One rank: runs the checks that are named on its standard input, one a line, and answers each with a line of JSON."""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import traceback
from datetime import timedelta

import torch
from torch import distributed

from distributed import checks


def main() -> None:
    rank, size, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed belongs into the log
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(minutes=10)
    )
    for line in sys.stdin:
        order = json.loads(line)
        faulthandler.dump_traceback_later(order["max_secs"], exit=True)
        try:
            answer = {"result": getattr(checks, order["check"])(*order["args"])}
        except BaseException:
            answer = {"raised": traceback.format_exc()}
        if order["barrier"]:
            distributed.barrier()
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps(answer), file=answers, flush=True)
    if distributed.is_initialized():
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
