"""The usual ways of training that `cxr` is compared with: a notebook's loop, Lightning, and a loop like timm's."""

from __future__ import annotations

import importlib.util
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.models import ResNet

from common import Batch, Laps, Task
from cxr.data.views import IMAGENET_MEAN, IMAGENET_STD
from cxr.errors import UserError
from cxr.network.freezing import apply_phase


class Files(Dataset[tuple[Tensor, int]]):
    """Images as a notebook reads them: (image [3, size, size], label)."""

    def __init__(self, root: Path, table: pd.DataFrame, size: int, training: bool):
        self.paths, self.labels = [root / p for p in table["path"]], list(table["label"])
        augment = [transforms.RandomAffine(10, (0.05, 0.05), (0.8, 1.25)), transforms.ColorJitter(0.1, 0.3)]
        last = [transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
        self.transform = transforms.Compose([transforms.Resize((size, size)), *(augment if training else []), *last])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with Image.open(self.paths[index]) as image:
            return self.transform(image.convert("RGB")), int(self.labels[index])


def loaders(task: Task, persistent: bool = False) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """The peers' batches, (train, val). As in `cxr`, a last training batch with a single image is dropped."""
    train, val = (
        Files(task.root, task.table[task.table["split"] == name], task.config.image_size, name == "train")
        for name in ("train", "val")
    )
    load = partial(
        DataLoader,
        batch_size=task.config.batch_size,
        num_workers=task.workers,
        pin_memory=task.device.type == "cuda",
        persistent_workers=persistent and task.workers > 0,
        # From Python 3.14 on, workers would not be forked but started afresh, which would favour cxr.
        multiprocessing_context="fork" if task.workers > 0 and sys.platform == "linux" else None,
    )
    single = len(train) % task.config.batch_size == 1
    return load(train, shuffle=True, drop_last=single), load(val)


def to_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches, on the device."""
    for images, labels in batches:
        yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The autocast context of a precision: `fp32`, `bf16` or `fp16`."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision != "fp32")


def use_torch_defaults(device: torch.device) -> None:
    """Undo what `ready_machine` sets for `cxr` and the peers would not use: deterministic kernels, no TF32."""
    if device.type == "cuda":
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.allow_tf32 = True


def trainable(task: Task, model: ResNet) -> list[nn.Parameter]:
    """Freeze by `requires_grad` alone; returns the parameters that train, on the device.

    The whole network is in train mode, as in most notebooks: BatchNorm statistics of the frozen part change.
    """
    use_torch_defaults(task.device)
    parameters = apply_phase(model.to(task.device), task.config.phases[0])
    model.train()
    return parameters


def notebook_loop(task: Task, model: ResNet) -> Laps:
    """The usual loop: decode and augment each image in every epoch, run the whole network."""
    (train, val), device = loaders(task), task.device
    optimizer = torch.optim.Adam(trainable(task, model), task.config.rates()[0])
    laps = Laps(device, task.images("train"))
    for _ in range(task.config.epochs):
        model.train()
        for images, labels in to_device(train, device):
            optimizer.zero_grad()
            with autocast(device, task.peer_precision):
                loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
        laps.trained()
        model.eval()
        with torch.no_grad(), autocast(device, task.peer_precision):
            for images, _ in to_device(val, device):
                model(images)
        laps.validated()
    return laps


def lightning_module(model: ResNet, optimizer: torch.optim.Optimizer, laps: Laps) -> Any:
    """The network as a LightningModule that times its epochs."""
    import lightning

    class Classifier(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Batch, index: int) -> Tensor:
            loss = F.cross_entropy(self.model(batch[0]), batch[1])
            self.log("train_loss", loss)
            return loss

        def validation_step(self, batch: Batch, index: int) -> None:
            self.log("val_loss", F.cross_entropy(self.model(batch[0]), batch[1]))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer

        def on_train_start(self) -> None:
            laps.begin()

        def on_validation_start(self) -> None:
            laps.trained()

        def on_train_epoch_end(self) -> None:  # Lightning validates before it
            laps.validated()

    return Classifier()


def lightning_trainer(task: Task) -> Any:
    """A Trainer that trains and validates, and does nothing else."""
    import lightning

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # after the import, which sets it lower
    return lightning.Trainer(
        accelerator=task.device.type,
        devices=1,
        precision="bf16-mixed" if task.peer_precision == "bf16" else "32-true",
        max_epochs=task.config.epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


def lightning_loop(task: Task, model: ResNet) -> Laps:
    """Lightning's Trainer."""
    optimizer = torch.optim.Adam(trainable(task, model), task.config.rates()[0])
    laps = Laps(task.device, task.images("train"))
    module = lightning_module(model, optimizer, laps)
    with warnings.catch_warnings():  # advice on workers and train mode, which are as intended here
        warnings.simplefilter("ignore")
        lightning_trainer(task).fit(module, *loaders(task))
    return laps


def timm_loop(task: Task, model: ResNet) -> Laps:
    """A loop like that of timm's train.py: its optimizer factory and meters, and persistent workers."""
    from timm.optim import create_optimizer_v2

    train, val = loaders(task, persistent=True)
    optimizer = create_optimizer_v2(trainable(task, model), opt="adam", lr=task.config.rates()[0])
    laps = Laps(task.device, task.images("train"))
    for _ in range(task.config.epochs):
        timm_train(task, model, train, optimizer)
        laps.trained()
        timm_validate(task, model, val)
        laps.validated()
    return laps


def timm_train(task: Task, model: ResNet, batches: DataLoader[Any], optimizer: torch.optim.Optimizer) -> float:
    """`train_one_epoch`, which reads the loss in every step; returns its mean."""
    from timm.utils import AverageMeter

    losses, update_time, data_time = AverageMeter(), AverageMeter(), AverageMeter()
    model.train()
    optimizer.zero_grad()
    started = time.time()
    for images, labels in to_device(batches, task.device):
        data_time.update(time.time() - started)
        with autocast(task.device, task.peer_precision):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.update(loss.item(), len(images))
        optimizer.zero_grad()
        update_time.update(time.time() - started)
        started = time.time()
    return float(losses.avg)


def timm_validate(task: Task, model: ResNet, batches: DataLoader[Any]) -> tuple[float, float]:
    """`validate`, which reads loss and accuracy in every step; returns (mean loss, accuracy in percent)."""
    from timm.utils import AverageMeter, accuracy

    losses, top1 = AverageMeter(), AverageMeter()
    model.eval()
    with torch.inference_mode():
        for images, labels in to_device(batches, task.device):
            with autocast(task.device, task.peer_precision):
                logits = model(images)
                loss = F.cross_entropy(logits, labels)
            (right,) = accuracy(logits, labels, topk=(1,))
            losses.update(loss.item(), len(images))
            top1.update(right.item(), len(images))
    return float(losses.avg), float(top1.avg)


LOOPS: dict[str, Callable[[Task, ResNet], Laps]] = {
    "notebook": notebook_loop,
    "lightning": lightning_loop,
    "timm": timm_loop,
}
OPTIONAL = ("lightning", "timm")  # loops named after the package that they need


def require_installed(peers: tuple[str, ...]) -> None:
    """Raise `UserError` for peers whose package is not installed."""
    if missing := [peer for peer in peers if peer in OPTIONAL and importlib.util.find_spec(peer) is None]:
        raise UserError(
            f"--peers {','.join(peers)}: {', '.join(missing)} not installed; "
            "use uv run --group bench python experiments/bench_train.py …"
        )
