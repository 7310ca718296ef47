"""One trial of a search: a child run that trains with suggested parameters and reports its objective."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import optuna
from optuna.trial import FrozenTrial, Trial, TrialState
from torch import nn

from cxr.config import TrainConfig, TuneConfig, flatten
from cxr.data.load import Data
from cxr.errors import Pruned, Stopped
from cxr.machine import Machine, memory_errors, seed_everything
from cxr.network.resnet import ready_model
from cxr.network.weights import InitialWeights
from cxr.runs.record import card_of
from cxr.runs.resume import checkpoints_of, outbox_of
from cxr.runs.train import train_model
from cxr.serving.predictor import save_package
from cxr.studies.optuna_study import ERROR, RUN, locked, suggest, trial_config
from cxr.tracking.lifecycle import open_run
from cxr.tracking.nested import AGAIN, keep_only
from cxr.tracking.reading import RunKind, Tag
from cxr.tracking.tracker import MlflowTracker
from cxr.training.loop import EpochRecord


@dataclass(frozen=True, slots=True)
class Search:
    """What the trials of a worker share. `data` has no test split; `weights` describes those in use."""

    config: TuneConfig
    data: Data
    weights: InitialWeights
    machine: Machine
    parent: MlflowTracker


def run_name(trial: int) -> str:
    """The name of a trial's run."""
    return f"trial-{trial:03}"


class TrialRunner:
    """Trains the trials of one worker, and logs the weights of the best one to its run."""

    def __init__(self, search: Search):
        self.search = search
        self._model: nn.Module | None = None  # of the last trial's first seed

    def objective(self, trial: Trial) -> float:
        """Train in a new child run and return the objective value."""
        search = self.search
        try:
            config = suggest(trial, search.config)
            name, parent, outbox = run_name(trial.number), search.parent.run_id, outbox_of(config)
            with open_run(name, parent=parent, stops=False, again=AGAIN, outbox=outbox) as tracker:
                trial.set_user_attr(RUN, tracker.run_id)
                tracker.params(flatten(config))
                tracker.tags({Tag.STRATEGY: config.strategy, Tag.TRIAL: str(trial.number), Tag.KIND: RunKind.TRIAL})
                return self._train(trial, config, tracker)
        except Pruned as error:
            raise optuna.TrialPruned(str(error)) from error
        except Stopped as error:
            raise KeyboardInterrupt from error
        except Exception as error:
            trial.set_user_attr(ERROR, f"{type(error).__name__}: {error}"[:2000])
            raise

    def keep_if_best(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Keep only the weights of the best trial of the study."""
        if trial.state != TrialState.COMPLETE:
            return
        with locked(self.search.config.storage):
            if study.best_trial.number == trial.number:
                self._keep_weights(trial)

    def _train(self, trial: Trial, config: TrainConfig, tracker: MlflowTracker) -> float:
        """Train every seed and return the mean objective."""
        seeds, values = self.search.config.seeds, list[float]()
        try:
            with memory_errors():
                for number in range(seeds):
                    values.append(self._train_seed(trial, replace(config, seed=config.seed + number), tracker, number))
                    if seeds > 1:
                        wilcoxon = self.search.config.pruner == "WilcoxonPruner"
                        self._report(trial, values[-1] if wilcoxon else float(np.mean(values)), number, "seed")
        finally:
            shutil.rmtree(checkpoints_of(config, tracker.run_id), ignore_errors=True)
        mean = float(np.mean(values))
        tracker.metrics({"objective": mean})
        return mean

    def _train_seed(self, trial: Trial, config: TrainConfig, tracker: MlflowTracker, number: int) -> float:
        search, objective = self.search, self.search.config.objective
        seed_everything(config.seed, search.machine.device)
        model, _ = ready_model(config, len(search.data.task.classes), search.machine.device)

        def report_epoch(record: EpochRecord) -> None:
            if search.config.seeds == 1:
                self._report(trial, record.metrics[objective], record.epoch, "epoch")

        label = f"seed{number}_" if number else ""
        records, _ = train_model(
            config, tracker, search.data, search.machine, model, _silent, report_epoch, label, search.config.trials
        )
        if number == 0:
            self._model = model
        return [record for record in records if record.improved][-1].metrics[objective]  # of the best epoch

    def _report(self, trial: Trial, value: float, step: int, unit: str) -> None:
        config = self.search.config
        trial.report(value, step)
        if trial.should_prune():
            raise Pruned(f"pruned by {config.pruner} at {unit} {step}: {config.objective} {value:.4f}")

    def _keep_weights(self, trial: FrozenTrial) -> None:
        assert self._model is not None
        search, config = self.search, trial_config(self.search.config, trial.params)
        with tempfile.TemporaryDirectory() as work:
            save_package(Path(work), self._model.state_dict(), card_of(config, search.weights, search.data))
            keep_only(search.parent.run_id, trial.user_attrs[RUN], Path(work))


def _silent(line: str) -> None:
    """Discard the lines of the epochs: a trial prints one line when it ends."""
