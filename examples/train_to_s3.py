"""Training whose checkpoints are kept in a bucket; run again, it resumes from there.

    pip install "asyncckpt[s3]"
    python examples/train_to_s3.py s3://bucket/run                      # straight to S3
    python examples/train_to_s3.py s3://bucket/run --local checkpoints  # to a disk first, mirrored in the background

Credentials, region and endpoint are found as every AWS tool finds them: in the environment, profiles, on the machine.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

import asyncckpt

NUM_STEPS, SAVE_EVERY = 30, 10


def make_manager(url: str, local: str | None) -> asyncckpt.CheckpointManager:
    """A directory in the bucket; or one on this machine, with its mirror there."""
    policy = asyncckpt.EverySteps(SAVE_EVERY)
    if local is None:
        return asyncckpt.CheckpointManager(url, max_checkpoints=2, save_policy=policy)
    return asyncckpt.CheckpointManager(local, max_checkpoints=2, mirror=url, save_policy=policy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--local", help="a directory that checkpoints are written to first")
    parser.add_argument("--steps", type=int, default=NUM_STEPS)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 1))
    optimizer = torch.optim.AdamW(model.parameters())
    with make_manager(arguments.url, arguments.local) as manager:
        _, checkpoint = manager.load_latest(model, optimizer)  # the newest valid one, here or there
        first = checkpoint.get("global_step", 0) + 1
        print(f"from step {first}")
        for step in range(first, arguments.steps + 1):
            loss = model(torch.randn(32, 512)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if manager.should_save(step):
                manager.save(model, optimizer, epoch=1, global_step=step, train_loss=loss.item())
        manager.wait(tier="local" if arguments.local is None else "mirror")  # the bucket has it
        for info in manager.list_checkpoints():
            print(info.filepath)


if __name__ == "__main__":
    main()
