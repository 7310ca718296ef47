"""One training loop for every strategy: a generator of epoch records that knows no tracker and no search."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import softmax
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from cxr.data.views import Batch
from cxr.errors import FreezeError, UserError
from cxr.network.freezing import FreezeProof, apply_phase, bit_sums, checksum, stage_state
from cxr.network.inference import infer
from cxr.network.stages import stage_modules, stages_of
from cxr.strategies import Phase
from cxr.training import distributed as parallel
from cxr.training.averaging import WeightAverage
from cxr.training.checkpoint import Checkpoints
from cxr.training.faster import Compiled, RecordedStep, Step, Suffix


@dataclass(frozen=True, slots=True)
class EpochRecord:
    """One epoch. `epoch` counts from 0 across phases; `proof` is set on a phase's last epoch.

    `restored` marks one that an earlier attempt trained, read from its checkpoint.
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


class Batches(Protocol):
    """What `fit` trains and validates on: (features, labels) on the model's device.

    Features are what enters the phase's first trainable stage. `enter` is called when a phase begins or is resumed.
    """

    def enter(self, phase: Phase) -> None:
        """Prepare for a phase."""

    def train(self, phase: Phase, epoch: int) -> Iterable[Batch]:
        """One epoch of training batches."""

    def val(self, phase: Phase) -> Iterable[Batch]:
        """The validation split."""

    def stressed(self, phase: Phase) -> Iterable[Batch]:
        """The stressed validation split; asked for only where it selects."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """How a run trains.

    `phases` and the learning rate of each, in order; the maximum of epochs per phase; Adam's L2 penalty; StepLR; epochs
    without improvement before a phase stops; precision (fp32, bf16, fp16); `select`, the validation metric that picks
    the best epoch; `compile`, what makes steps faster: `inductor` (`Compiled`), `graphs` (`RecordedStep`) or `none`;
    `average`: `sma` validates, saves and returns the mean of the weights over the steps from the second epoch of the
    last phase on (`WeightAverage`), `none` the weights; `seed`, of dropout and stochastic depth.
    """

    phases: tuple[Phase, ...]
    rates: tuple[float, ...]
    epochs: int
    weight_decay: float
    step_size: int
    gamma: float
    patience: int
    precision: str
    select: str = "val_loss"
    compile: str = "none"
    average: str = "none"
    seed: int = 0


@dataclass(slots=True)
class Progress:
    """Where the loop is; with tensors, optimizer and generators it is the complete state."""

    phase: int = 0
    phase_epoch: int = 0
    epoch: int = 0
    phase_best: float = math.inf
    stale: int = 0
    best_loss: float = math.inf  # of the metric that selects
    best_epoch: int = -1
    best_files: list[str] = field(default_factory=list)
    base: str = ""
    before: str = ""
    history: list[dict[str, Any]] = field(default_factory=list)


class PhaseTrainer:
    """What trains one phase: optimizer, scheduler and scaler over what the phase trains, and its step."""

    def __init__(self, model: nn.Module, phase: Phase, rate: float, schedule: Schedule, class_weights: Tensor):
        device = next(model.parameters()).device
        trained = [module for stage in phase.trainable for module in stage_modules(model, stage)]
        parallel.share_batchnorm(model, trained, device)
        parameters, decay = apply_phase(model, phase), schedule.weight_decay
        self.optimizer = torch.optim.Adam(parameters, rate, weight_decay=decay, fused=True)
        self.frozen_bits = bit_sums(model, phase.frozen)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, schedule.step_size, schedule.gamma)
        self.scaler = torch.amp.GradScaler(device.type, enabled=schedule.precision == "fp16")
        suffix = Suffix(model, phase.trainable)
        network = parallel.data_parallel(Compiled(suffix) if schedule.compile == "inductor" else suffix)
        self.plain = Step(network, self.optimizer, self.scaler, class_weights, schedule.precision)
        self.step = RecordedStep(self.plain) if schedule.compile == "graphs" else self.plain

    def state(self) -> dict[str, Any]:
        """The state of optimizer, scheduler and scaler."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take up what `state` gave."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])


class Loop:
    """The state of training: the model, where it is (`progress`), what trains the phase under way (`trainer`), and the
    mean of its weights (`average`), if there is to be one.

    Made at the start of the phase that `progress` names, with the model as it is then.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        class_weights: Tensor,
        data: Batches,
        checkpoints: Checkpoints,
        progress: Progress,
    ):
        self.model, self.schedule, self.data, self.checkpoints = model, schedule, data, checkpoints
        self.device = next(model.parameters()).device
        self.class_weights = class_weights.to(self.device)
        self.progress = progress
        self.trainer, self.average = self._trainer(), self._average()

    @property
    def phase(self) -> Phase:
        """The phase under way."""
        return self.schedule.phases[self.progress.phase]

    def _trainer(self) -> PhaseTrainer:
        self.data.enter(self.phase)
        rate = self.schedule.rates[self.progress.phase]
        return PhaseTrainer(self.model, self.phase, rate, self.schedule, self.class_weights)

    def _average(self) -> WeightAverage | None:
        last = self.progress.phase + 1 == len(self.phases)
        return WeightAverage(self.model, self.phase.trainable) if last and self.schedule.average == "sma" else None

    @property
    def judged(self) -> nn.Module:
        """The network that is validated and saved: with the mean of the weights once there is one."""
        return self.average.model if self.average and self.average.steps else self.model

    def phase_is_over(self) -> bool:
        """Whether the epoch limit is reached or the patience is spent."""
        progress, schedule = self.progress, self.schedule
        return progress.phase_epoch >= schedule.epochs or progress.stale >= schedule.patience

    def begin_phase(self, index: int) -> None:
        """Begin a phase from the best checkpoint so far, and note what must not change."""
        load_tensors(self.model, self.checkpoints, self.progress.best_files)
        _begin(self.progress, index, self.model, self.phases[index], self.checkpoints)
        self.trainer, self.average = self._trainer(), self._average()

    @property
    def phases(self) -> tuple[Phase, ...]:
        """All phases, in order."""
        return self.schedule.phases

    def save(self) -> None:
        """Write the complete state, while the next epoch trains."""
        state = {
            "progress": asdict(self.progress),
            "tensors": stage_state(self.model, self.phase.trainable),
            **self.trainer.state(),
            "generators": _generators(self.device),
            **({"average": self.average.state()} if self.average else {}),
        }
        self.checkpoints.save(state, keep={self.progress.base, *self.progress.best_files})


def load_tensors(model: nn.Module, checkpoints: Checkpoints, files: list[str]) -> None:
    """Load saved tensors into the model."""
    checkpoints.flush()
    parallel.wait()  # for the files of the first process
    model.load_state_dict(checkpoints.load_tensors(files), strict=False)


def _begin(progress: Progress, index: int, model: nn.Module, phase: Phase, checkpoints: Checkpoints) -> None:
    """Set `progress` to the start of a phase with the model as it is."""
    progress.phase, progress.phase_epoch, progress.stale, progress.phase_best = index, 0, 0, math.inf
    progress.base = checkpoints.save_tensors(f"base-{index}", stage_state(model, stages_of(model)))
    progress.before = checksum(model, phase.frozen)


def _start(
    model: nn.Module, schedule: Schedule, class_weights: Tensor, data: Batches, checkpoints: Checkpoints
) -> Loop:
    """The loop at its start, or where the checkpoint that `Loop.save` wrote says."""
    state = checkpoints.load()
    if state is None:
        progress = Progress()
        _begin(progress, 0, model, schedule.phases[0], checkpoints)
        return Loop(model, schedule, class_weights, data, checkpoints, progress)
    progress = Progress(**state["progress"])
    load_tensors(model, checkpoints, [progress.base])
    model.load_state_dict(state["tensors"], strict=False)
    loop = Loop(model, schedule, class_weights, data, checkpoints, progress)
    loop.trainer.load(state)
    if loop.average:
        loop.average.load(state["average"])
    torch.set_rng_state(state["generators"]["cpu"])
    if "cuda" in state["generators"]:
        torch.cuda.set_rng_state(state["generators"]["cuda"], loop.device)
    return loop


def _generators(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def fit(
    model: nn.Module, schedule: Schedule, class_weights: Tensor, data: Batches, checkpoints: Checkpoints
) -> Iterator[EpochRecord]:
    """Train through all phases and leave the best checkpoint (lowest `schedule.select`) in the model.

    If the checkpoint folder holds a state, training resumes from it: the records up to there are yielded again first. A
    record is yielded while its checkpoint is written; that of the record before is complete (`Checkpoints`). Raises
    `FreezeError` when a frozen stage changed, `UserError` when the loss is not finite or a checkpoint cannot be
    written.
    """
    loop = _start(model, schedule, class_weights, data, checkpoints)
    yield from (_record_from(row) for row in loop.progress.history)
    while True:
        while not loop.phase_is_over():
            yield _epoch(loop)
        if loop.progress.phase + 1 == len(loop.phases):
            break
        loop.begin_phase(loop.progress.phase + 1)
    load_tensors(model, checkpoints, loop.progress.best_files)
    parallel.wait()  # the files may be removed now
    model.eval()


def _record_from(row: dict[str, Any]) -> EpochRecord:
    proof = row["proof"]
    return EpochRecord(**{**row, "proof": FreezeProof(**proof) if proof else None, "restored": True})


def _epoch(loop: Loop) -> EpochRecord:
    progress, data = loop.progress, loop.data
    started = time.perf_counter()
    rate = loop.trainer.optimizer.param_groups[0]["lr"]
    train_loss, train_accuracy, images = _train(loop, data.train(loop.phase, progress.epoch))
    trained = time.perf_counter()
    val_loss, val_accuracy, val_roc_auc = _validate(loop, data.val(loop.phase))
    selects_stressed = loop.schedule.select == "stressed_val_loss"
    stressed = {"stressed_val_loss": _validate(loop, data.stressed(loop.phase))[0]} if selects_stressed else {}
    evaluated = time.perf_counter()
    loop.trainer.scheduler.step()
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
        **({"averaged_steps": float(loop.average.steps)} if loop.average else {}),
    }
    _require_finite(metrics, loop)
    return _settle(loop, metrics)


def _require_finite(metrics: dict[str, float], loop: Loop) -> None:
    if not all(math.isfinite(metrics[name]) for name in ("train_loss", "val_loss", loop.schedule.select)):
        option = f"--{loop.phase.lr.replace('_', '-')}"
        raise UserError(
            f"training diverged in phase {loop.phase.name}, epoch {loop.progress.epoch}: the loss is not finite; "
            f"lower {option} (now {metrics['lr']:g})"
        )


def _settle(loop: Loop, metrics: dict[str, float]) -> EpochRecord:
    """Prove the freezing, compare the epoch with the best so far, save, and return its record."""
    progress = loop.progress
    loop.checkpoints.flush()  # of the epoch before: no more than one may wait
    # In every epoch, so that a network whose frozen part changed is never saved.
    _require_frozen(loop, bit_sums(loop.model, loop.phase.frozen) == loop.trainer.frozen_bits)
    judged = metrics[loop.schedule.select]
    improved = judged < progress.best_loss
    if improved:
        progress.best_loss, progress.best_epoch = judged, progress.epoch
        trained = loop.checkpoints.save_tensors(
            f"best-{progress.epoch}", stage_state(loop.judged, loop.phase.trainable)
        )
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
            "the result of this run is invalid"
        )


def _train(loop: Loop, batches: Iterable[Batch]) -> tuple[float, float, int]:
    """One pass. Returns (weighted loss, accuracy, images); the sums stay on the device until the end."""
    apply_phase(loop.model, loop.phase)
    images, trainer = 0, loop.trainer
    average = loop.average if loop.progress.phase_epoch else None
    trainer.plain.clear()
    for features, labels in _seeded(batches, loop.schedule.seed, loop.progress.epoch):
        trainer.step(features, labels)
        if average:
            average.update()
        images += len(labels)
    sums = trainer.plain.sums
    loss, weights, correct, shown = parallel.summed(torch.cat([sums, sums.new_tensor([images])])).tolist()
    return loss / weights, correct / shown, int(shown)


def _seeded(batches: Iterable[Batch], seed: int, epoch: int) -> Iterator[Batch]:
    """The batches of an epoch, torch's generator seeded for what it trains: dropout and stochastic depth.

    Seeded when the first batch is there, as making batches draws from that generator, too, and how often depends on
    what is reused and what a resumed run makes again.
    """
    for number, batch in enumerate(batches):
        if number == 0:
            entropy = np.random.SeedSequence((seed, epoch, parallel.rank()))
            torch.manual_seed(int(entropy.generate_state(1, np.uint32)[0]))
        yield batch


def _validate(loop: Loop, batches: Iterable[Batch]) -> tuple[float, float, float]:
    """(weighted loss, accuracy, ROC-AUC) in eval mode."""
    logits, labels = infer(loop.judged, batches, loop.schedule.precision, loop.phase.trainable)
    logits = parallel.broadcast(logits.to(loop.device)).cpu()  # every process must decide alike
    weights = loop.class_weights.cpu()
    loss = (F.cross_entropy(logits, labels, weights, reduction="sum") / weights[labels].sum()).item()
    accuracy = (logits.argmax(1) == labels).float().mean().item()
    return loss, accuracy, _roc_auc(labels.numpy(), logits.numpy())


def _roc_auc(labels: np.ndarray, logits: np.ndarray) -> float:
    """Of logits [n, k]; of more than two classes the mean over each against the rest. NaN where one is not finite."""
    if not np.isfinite(logits).all():
        return math.nan
    if logits.shape[1] == 2:
        return float(roc_auc_score(labels, (logits[:, 1] - logits[:, 0]).astype(np.float64)))
    scores = softmax(logits.astype(np.float64), axis=1)
    return float(roc_auc_score(labels, scores, multi_class="ovr", labels=range(logits.shape[1])))


def class_weights(labels: np.ndarray) -> Tensor:
    """Weights [k] inverse to the class counts of the training labels, mean 1 over its images.

    scikit-learn's `compute_class_weight("balanced")`.
    """
    from sklearn.utils.class_weight import compute_class_weight

    return torch.tensor(compute_class_weight("balanced", classes=np.unique(labels), y=labels), dtype=torch.float32)
