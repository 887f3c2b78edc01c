"""A training loop with epochs, a data loader, validation and a scheduler, that saves after every epoch and resumes.

    python examples/train_with_checkpointing.py --epochs 5
    python examples/train_with_checkpointing.py --epochs 10 --resume-from latest
    python examples/train_with_checkpointing.py --epochs 10 --resume-from best
    python examples/train_with_checkpointing.py --model transformer --gradient-checkpointing

`train_with_checkpointing` is the part to take home. The data are made up, so that this runs anywhere in seconds.
Gradient checkpointing is another thing by a similar name: it saves memory by computing activations twice, and goes well
together with checkpoints of training.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.checkpoint import checkpoint_sequential
from torch.utils.data import DataLoader, TensorDataset

from asyncckpt import CheckpointManager

Batches = DataLoader[tuple[Tensor, ...]]

NUM_CLASSES = 4
LENGTH, WIDTH = 8, 16  # of a sample


def train_with_checkpointing(
    model: nn.Module,
    train_loader: Batches,
    val_loader: Batches,
    optimizer: torch.optim.Optimizer,
    scheduler: LRScheduler | None,
    criterion: nn.Module,
    num_epochs: int,
    checkpoint_manager: CheckpointManager,
    device: torch.device,
    config: Mapping[str, Any],
    resume_from: str | None = None,
) -> nn.Module:
    """Train until `num_epochs` are done in all, saving after each.

    Returns once every checkpoint is durable. A resumed run does what an uninterrupted one would have done, bit for bit:
    the manager restores torch's random number generator, which shuffles the loader's samples and draws dropout.

    Args:
        resume_from: "latest", "best", or a checkpoint's path.
    """
    start_epoch, global_step = 0, 0
    model.to(device)
    if resume_from is not None:
        restored = (model, optimizer, scheduler, device)
        if resume_from == "latest":
            start_epoch, checkpoint = checkpoint_manager.load_latest(*restored)
        elif resume_from == "best":
            start_epoch, checkpoint = checkpoint_manager.load_best(*restored)
        else:
            start_epoch, checkpoint = checkpoint_manager.load(resume_from, *restored)
        global_step = checkpoint.get("global_step", 0)
        del checkpoint  # it is mapped from the file, which would keep its space on the disk
        print(f"Resuming from epoch {start_epoch}, step {global_step}")

    for epoch in range(start_epoch + 1, num_epochs + 1):
        model.train()
        loss_sum, num_samples = 0.0, 0
        for data, target in train_loader:
            data, target = data.to(device), target.to(device)
            loss = criterion(model(data), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss_sum += loss.item() * len(target)
            num_samples += len(target)
            global_step += 1
        train_loss = loss_sum / num_samples

        val_loss, val_accuracy = validate(model, val_loader, criterion, device)
        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(val_loss)
        elif scheduler is not None:
            scheduler.step()

        print(
            f"Epoch {epoch}/{num_epochs}  train loss {train_loss:.6f}  val loss {val_loss:.6f}  "
            f"val accuracy {val_accuracy:.4f}  lr {optimizer.param_groups[0]['lr']:.6f}"
        )
        checkpoint_manager.save(
            model=model,
            optimizer=optimizer,
            epoch=epoch,
            global_step=global_step,
            train_loss=train_loss,
            val_loss=val_loss,
            val_metrics={"accuracy": val_accuracy},
            scheduler=scheduler,
            config=config,
        )
    checkpoint_manager.wait()
    return model


@torch.no_grad()
def validate(model: nn.Module, loader: Batches, criterion: nn.Module, device: torch.device) -> tuple[float, float]:
    """The mean loss and the accuracy over a loader's samples."""
    model.eval()
    loss_sum, num_correct, num_samples = 0.0, 0, 0
    for data, target in loader:
        data, target = data.to(device), target.to(device)
        output = model(data)
        loss_sum += criterion(output, target).item() * len(target)
        num_correct += int((output.argmax(dim=1) == target).sum())
        num_samples += len(target)
    return loss_sum / num_samples, num_correct / num_samples


# --- something to train ---


class LargeModel(nn.Module):
    """A transformer that can recompute its activations in place of keeping them: (batch, length, width) in."""

    def __init__(self, num_layers: int, num_segments: int, *, gradient_checkpointing: bool) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(WIDTH, nhead=2, dim_feedforward=32, batch_first=True)
                for _ in range(num_layers)
            )
        )
        self.head = nn.Linear(WIDTH, NUM_CLASSES)
        self.num_segments = num_segments
        self.gradient_checkpointing = gradient_checkpointing

    def forward(self, x: Tensor) -> Tensor:
        if self.gradient_checkpointing and self.training:
            x = checkpoint_sequential(self.layers, self.num_segments, x, use_reentrant=False)
        else:
            x = self.layers(x)
        logits: Tensor = self.head(x.mean(dim=1))
        return logits


def make_model(name: str, *, gradient_checkpointing: bool = False) -> nn.Module:
    if name == "transformer":
        return LargeModel(num_layers=4, num_segments=2, gradient_checkpointing=gradient_checkpointing)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(LENGTH * WIDTH, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, NUM_CLASSES)
    )


def make_loaders(num_samples: int = 512) -> tuple[Batches, Batches]:
    """Noise around one pattern a class: to train on, shuffled anew every epoch, and to validate on."""
    generator = torch.Generator().manual_seed(0)  # its own, so that every run has the same data
    patterns = torch.randn(NUM_CLASSES, LENGTH, WIDTH, generator=generator)
    targets = torch.randint(NUM_CLASSES, (num_samples,), generator=generator)
    data = patterns[targets] + 3 * torch.randn(num_samples, LENGTH, WIDTH, generator=generator)
    num_train = num_samples * 3 // 4
    train, val = (TensorDataset(data[part], targets[part]) for part in (slice(num_train), slice(num_train, None)))
    return DataLoader(train, batch_size=32, shuffle=True), DataLoader(val, batch_size=50)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("perceptron", "transformer"), default="perceptron")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="of the transformer")
    parser.add_argument("--epochs", type=int, default=5, help="up to which epoch to train")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--checkpoint-dir", type=Path, default=Path("checkpoints"))
    parser.add_argument("--resume-from", metavar="latest|best|PATH")
    options = parser.parse_args()

    torch.manual_seed(0)
    model = make_model(options.model, gradient_checkpointing=options.gradient_checkpointing)
    train_loader, val_loader = make_loaders()
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)
    scheduler = ReduceLROnPlateau(optimizer, patience=2)
    with CheckpointManager(options.checkpoint_dir, max_checkpoints=3) as manager:
        train_with_checkpointing(
            model=model,
            train_loader=train_loader,
            val_loader=val_loader,
            optimizer=optimizer,
            scheduler=scheduler,
            criterion=nn.CrossEntropyLoss(),
            num_epochs=options.epochs,
            checkpoint_manager=manager,
            device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
            config={"model": options.model, "learning_rate": options.learning_rate},
            resume_from=options.resume_from,
        )
        for info in manager.list_checkpoints():
            print(
                f"{info.filepath.name}  accuracy {info.val_metrics['accuracy']:.4f}{'  best' if info.is_best else ''}"
            )


if __name__ == "__main__":
    main()
