"""One training loop for every strategy: a generator of epoch records that knows no tracker and no search."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torchvision.models import ResNet

from cxr.data.batches import Batch
from cxr.errors import FreezeError, UserError
from cxr.network.freezing import FreezeProof, bit_sums, checksum, obey, stage_state
from cxr.network.inference import autocast, infer
from cxr.network.resnet import stage_modules
from cxr.strategies import STAGES, Phase
from cxr.training import distributed as parallel
from cxr.training.checkpoint import Checkpoints
from cxr.training.faster import Fast, Suffix


@dataclass(frozen=True, slots=True)
class EpochRecord:
    """One epoch. `epoch` counts on from 0 across phases; `proof` is there on a phase's last epoch.

    `restored` is one of an earlier attempt, read from its checkpoint.
    """

    epoch: int
    phase: str
    phase_index: int
    metrics: dict[str, float]
    improved: bool
    proof: FreezeProof | None
    restored: bool = False

    def row(self) -> dict[str, Any]:
        """Flat, for a table: epoch, phase, improved and the metrics."""
        return {"epoch": self.epoch, "phase": self.phase, "improved": self.improved, **self.metrics}


@dataclass(frozen=True, slots=True)
class Schedule:
    """How every phase trains: limits, Adam's L2 penalty, StepLR, the arithmetic (fp32, bf16, fp16), and what
    makes its steps faster (`Fast`)."""

    epochs: int
    weight_decay: float
    step_size: int
    gamma: float
    patience: int
    precision: str
    compile: str = "none"


@dataclass(slots=True)
class Progress:
    """Where the loop is; together with tensors, optimizer and generators it is the complete state."""

    phase: int = 0
    phase_epoch: int = 0
    epoch: int = 0
    phase_best: float = math.inf
    stale: int = 0
    best_loss: float = math.inf  # or whatever else selects
    best_epoch: int = -1
    best_files: list[str] = field(default_factory=list)
    base: str = ""
    before: str = ""
    history: list[dict[str, Any]] = field(default_factory=list)


class Loop:
    """What changes while a phase runs: model, optimizer, scheduler, scaler and progress."""

    def __init__(
        self,
        model: ResNet,
        phases: tuple[Phase, ...],
        rates: tuple[float, ...],
        schedule: Schedule,
        class_weights: Tensor,
        checkpoints: Checkpoints,
        select: str,
    ):
        self.select = select
        self.model, self.phases, self.rates = model, phases, rates
        self.schedule, self.checkpoints = schedule, checkpoints
        self.device = next(model.parameters()).device
        self.class_weights = class_weights.to(self.device)
        self.progress = Progress()

    @property
    def phase(self) -> Phase:
        """The phase under way."""
        return self.phases[self.progress.phase]

    def begin_phase(self) -> None:
        """A new optimizer, scheduler and scaler over what the phase trains."""
        schedule = self.schedule
        trained = [module for stage in self.phase.trainable for module in stage_modules(self.model, stage)]
        parallel.share_batchnorm([self.model] if self.phase.first == "stem" else trained, self.device)
        self.optimizer = torch.optim.Adam(
            obey(self.model, self.phase),
            self.rates[self.progress.phase],
            weight_decay=schedule.weight_decay,
            fused=True,
        )
        self.bits = bit_sums(self.model, self.phase.frozen)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, schedule.step_size, schedule.gamma)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=schedule.precision == "fp16")
        suffix = Suffix(self.model, self.phase.trainable)
        self.suffix = parallel.together(Fast(suffix, schedule.compile) if schedule.compile != "none" else suffix)

    def phase_is_over(self) -> bool:
        """Whether the epoch limit is reached or the patience is spent."""
        progress, schedule = self.progress, self.schedule
        return progress.phase_epoch >= schedule.epochs or progress.stale >= schedule.patience

    def load(self, files: list[str]) -> None:
        """Put saved tensors into the model."""
        self.checkpoints.flush()
        parallel.wait()  # for the first process's files
        self.model.load_state_dict(self.checkpoints.load_tensors(files), strict=False)

    def save(self) -> None:
        """Write the complete state, while the next epoch trains."""
        state = {
            "progress": asdict(self.progress),
            "tensors": stage_state(self.model, self.phase.trainable),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "generators": _generators(self.device),
        }
        self.checkpoints.save(state, keep={self.progress.base, *self.progress.best_files})

    def restore(self, state: dict[str, Any]) -> None:
        """Take up a state that `save` wrote."""
        self.progress = Progress(**state["progress"])
        self.load([self.progress.base])
        self.model.load_state_dict(state["tensors"], strict=False)
        self.begin_phase()
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["generators"]["cpu"])
        if "cuda" in state["generators"]:
            torch.cuda.set_rng_state(state["generators"]["cuda"], self.device)


def _generators(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def fit(
    model: ResNet,
    phases: tuple[Phase, ...],
    rates: tuple[float, ...],
    schedule: Schedule,
    class_weights: Tensor,
    train_data: Callable[[Phase, int], Iterable[Batch]],
    val_data: Callable[[Phase], Iterable[Batch]],
    checkpoints: Checkpoints,
    stressed_data: Callable[[Phase], Iterable[Batch]] | None = None,
) -> Iterator[EpochRecord]:
    """Train through all phases and leave the best checkpoint (lowest validation loss) in the model.

    With `stressed_data`, the loss over that, `stressed_val_loss`, selects in its place, and stops a phase early.

    `train_data(phase, epoch)` and `val_data(phase)` give (features, labels) on the model's device; features are what
    enters the phase's first trainable stage. A folder with a checkpoint is taken up where it stopped: the records it
    already gave are given again, then the loop goes on. A record is given while its checkpoint is written; the one of
    the record before is there (`Checkpoints`). Raises `FreezeError` when something frozen moved, `UserError` when the
    loss is no longer finite or a checkpoint cannot be written.
    """
    select = "stressed_val_loss" if stressed_data else "val_loss"
    loop = Loop(model, phases, rates, schedule, class_weights, checkpoints, select)
    if state := checkpoints.load():
        loop.restore(state)
        yield from (_record_from(row) for row in loop.progress.history)
    else:
        _enter_phase(loop, 0)
    while True:
        while not loop.phase_is_over():
            yield _epoch(loop, train_data, val_data, stressed_data)
        if loop.progress.phase + 1 == len(phases):
            break
        _enter_phase(loop, loop.progress.phase + 1)
    loop.load(loop.progress.best_files)
    parallel.wait()  # whoever removes the files next
    model.eval()


def _record_from(row: dict[str, Any]) -> EpochRecord:
    proof = row["proof"]
    return EpochRecord(**{**row, "proof": FreezeProof(**proof) if proof else None, "restored": True})


def _enter_phase(loop: Loop, index: int) -> None:
    """Start from the best so far, and note what must not change."""
    progress = loop.progress
    if progress.best_files:
        loop.load(progress.best_files)
    progress.phase, progress.phase_epoch, progress.stale, progress.phase_best = index, 0, 0, math.inf
    progress.base = loop.checkpoints.save_tensors(f"base-{index}", stage_state(loop.model, STAGES))
    progress.before = checksum(loop.model, loop.phase.frozen)
    loop.begin_phase()


def _epoch(
    loop: Loop,
    train_data: Callable[[Phase, int], Iterable[Batch]],
    val_data: Callable[[Phase], Iterable[Batch]],
    stressed_data: Callable[[Phase], Iterable[Batch]] | None,
) -> EpochRecord:
    progress = loop.progress
    started = time.perf_counter()
    rate = loop.optimizer.param_groups[0]["lr"]
    train_loss, train_accuracy, images = _train(loop, train_data(loop.phase, progress.epoch))
    trained = time.perf_counter()
    val_loss, val_accuracy, val_roc_auc = _validate(loop, val_data(loop.phase))
    stressed = {"stressed_val_loss": _validate(loop, stressed_data(loop.phase))[0]} if stressed_data else {}
    evaluated = time.perf_counter()
    loop.scheduler.step()
    metrics = {
        "train_loss": train_loss,
        "val_loss": val_loss,
        **stressed,
        "train_accuracy": train_accuracy,
        "val_accuracy": val_accuracy,
        "val_roc_auc": val_roc_auc,
        "lr": float(rate),
        "epoch_seconds": trained - started,
        "eval_seconds": evaluated - trained,
        "images_per_second": images / (trained - started),
    }
    _require_finite(metrics, loop)
    return _settle(loop, metrics)


def _require_finite(metrics: dict[str, float], loop: Loop) -> None:
    if not all(math.isfinite(metrics[name]) for name in ("train_loss", "val_loss", loop.select)):
        option = f"--{loop.phase.lr.replace('_', '-')}"
        raise UserError(
            f"training diverged in phase {loop.phase.name}, epoch {loop.progress.epoch}: the loss is not finite; "
            f"lower {option} (now {metrics['lr']:g})"
        )


def _settle(loop: Loop, metrics: dict[str, float]) -> EpochRecord:
    """Prove the freezing, judge the epoch, keep what is best, save, and report."""
    progress = loop.progress
    loop.checkpoints.flush()  # of the epoch before: no more than one may wait
    # In every epoch, so that nothing is saved of a network whose frozen part moved.
    _require_frozen(loop, bit_sums(loop.model, loop.phase.frozen) == loop.bits)
    judged = metrics[loop.select]
    improved = judged < progress.best_loss
    if improved:
        progress.best_loss, progress.best_epoch = judged, progress.epoch
        trained = loop.checkpoints.save_tensors(f"best-{progress.epoch}", stage_state(loop.model, loop.phase.trainable))
        progress.best_files = [progress.base, trained]
    progress.stale = 0 if judged < progress.phase_best else progress.stale + 1
    progress.phase_best = min(progress.phase_best, judged)
    progress.phase_epoch += 1
    proof = _proof(loop) if loop.phase_is_over() else None
    record = EpochRecord(progress.epoch, loop.phase.name, progress.phase, metrics, improved, proof)
    progress.epoch += 1
    progress.history.append(asdict(record))
    loop.save()
    return record


def _proof(loop: Loop) -> FreezeProof:
    after = checksum(loop.model, loop.phase.frozen)
    _require_frozen(loop, after == loop.progress.before)
    return FreezeProof(loop.phase.name, loop.phase.frozen, loop.progress.before, after)


def _require_frozen(loop: Loop, unmoved: bool) -> None:
    if not unmoved:
        raise FreezeError(
            f"phase {loop.phase.name}: a frozen stage ({', '.join(loop.phase.frozen)}) changed while it trained; "
            "the run's result is void"
        )


def _train(loop: Loop, batches: Iterable[Batch]) -> tuple[float, float, int]:
    """One pass. Returns (weighted loss, accuracy, images); the sums stay on the device until the end."""
    obey(loop.model, loop.phase)
    sums = torch.zeros(3, device=loop.device)  # of losses, class weights, right answers
    images = 0
    for features, labels in batches:
        with autocast(loop.device, loop.schedule.precision):
            logits = loop.suffix(features).float()
        losses = F.cross_entropy(logits, labels, loop.class_weights, reduction="none")
        weight = loop.class_weights[labels].sum()
        share = parallel.summed(weight.clone()) / parallel.size()  # gradients are averaged over the processes
        loop.optimizer.zero_grad()
        loop.scaler.scale(losses.sum() / share).backward()  # type: ignore[no-untyped-call]
        loop.scaler.step(loop.optimizer)
        loop.scaler.update()
        right = (logits.detach().argmax(1) == labels).sum()
        sums += torch.stack([losses.detach().sum(), weight, right])
        images += len(labels)
    loss, weights, correct, shown = parallel.summed(torch.cat([sums, sums.new_tensor([images])])).tolist()
    return loss / weights, correct / shown, int(shown)


def _validate(loop: Loop, batches: Iterable[Batch]) -> tuple[float, float, float]:
    """(weighted loss, accuracy, ROC-AUC) in eval mode."""
    logits, labels = infer(loop.model, batches, loop.schedule.precision, loop.phase.trainable)
    logits = parallel.same(logits.to(loop.device)).cpu()  # what follows from them must follow in every process
    weights = loop.class_weights.cpu()
    loss = (F.cross_entropy(logits, labels, weights, reduction="sum") / weights[labels].sum()).item()
    accuracy = (logits.argmax(1) == labels).float().mean().item()
    scores = (logits[:, 1] - logits[:, 0]).numpy().astype(np.float64)
    auc = float(roc_auc_score(labels.numpy(), scores)) if np.isfinite(scores).all() else math.nan
    return loss, accuracy, auc


def class_weights(labels: np.ndarray) -> Tensor:
    """Weights [2] inverse to the class counts of the training labels, mean 1 over its images.

    scikit-learn's `compute_class_weight("balanced")`.
    """
    from sklearn.utils.class_weight import compute_class_weight

    return torch.tensor(compute_class_weight("balanced", classes=np.array([0, 1]), y=labels), dtype=torch.float32)
