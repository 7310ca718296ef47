"""A search: each trial of a study is a child run of one parent run.

Every trial has the study's seeds and split (common random numbers), so that trials differ by their parameters alone.
The test split is not there during a search; only the refit of the winner, an ordinary run, meets it. The trials wait in
the study's queue, so that any number of workers share them; one that a dead worker held goes back (Optuna's heartbeat).
"""

from __future__ import annotations

import json
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import FrameType

import numpy as np
import optuna
import torch
from optuna.trial import FrozenTrial, Trial, TrialState
from torchvision.models import ResNet

from cxr.config import TrainConfig, TuneConfig, flatten, own_parameters, without_password
from cxr.data.load import Data, read_data
from cxr.errors import InUseError, MachineError, Pruned, Stopped, UserError
from cxr.evaluation.report import format_interval
from cxr.machine import memory_explained, ready_machine, seed_everything
from cxr.network.resnet import build_model
from cxr.runs.audit import audited
from cxr.runs.messages import Say
from cxr.runs.record import card_of
from cxr.runs.result import RunResult
from cxr.runs.resume import is_lost
from cxr.runs.train import run_tracked, train_model
from cxr.serving.predictor import save_package
from cxr.storage import checkpoint_folder
from cxr.studies.optuna_study import (
    ERROR,
    MAX_RETRIES,
    OPEN,
    PARENT,
    REFIT,
    RUN,
    explained_storage,
    locked,
    open_study,
    requeue,
    slots,
    study_figures,
    suggest,
    trial_config,
    trials_table,
)
from cxr.tracking.lifecycle import open_run
from cxr.tracking.nested import (
    AGAIN,
    children,
    end,
    ending,
    is_finished,
    join_parent,
    keep_only,
    make_child,
    open_parent,
)
from cxr.tracking.signals import handlers
from cxr.tracking.tracker import MlflowTracker
from cxr.training.loop import EpochRecord

HOPELESS = 3  # so many failures before the first success are no accident


class Worker:
    """One process at work on a study."""

    def __init__(self, config: TuneConfig, data: Data, weights: str, say: Say):
        self.config, self.data, self.weights, self.say = config, data, weights, say
        self.machine = ready_machine(config.train)
        self.stopping, self.current = False, -1
        self.model: ResNet | None = None
        self.fatal: MachineError | None = None
        self.release: Callable[[], None] = lambda: None

    def open(self) -> None:
        """Make or continue the study and its parent run."""
        origin = {"data": self.data.fingerprint, "weights": self.weights}
        self.study = open_study(self.config, origin, self._make_parent, self._on_stale)
        self.parent = join_parent(str(self.study.user_attrs[PARENT]))

    def _make_parent(self) -> str:
        config = self.config.train
        tags = {"strategy": config.strategy, "data_fingerprint": self.data.fingerprint, "cxr.kind": "search"}
        params = {**flatten(config), **own_parameters(self.config)}
        return open_parent(f"tune-{config.strategy}-s{config.seed}", tags, params)

    def _on_stale(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """A worker fell silent: its trial goes back to the queue, and its run is ended."""
        requeue(study, trial, MAX_RETRIES)
        for run in children(self.parent.run_id):  # by name: a worker may die before it tells the study of its run
            if run.info.run_name == _run_name(trial.number) and run.info.status in ("RUNNING", "FINISHED"):
                end(run.info.run_id, "KILLED", "its worker fell silent; the trial went back to the queue")

    def work(self) -> None:
        """Run trials until none is left, here or anywhere."""
        while not self.stopping:
            if self._take_one():
                self._give_up_if_hopeless()
            elif any(trial.state in OPEN for trial in slots(self.study)):
                time.sleep(min(self.config.heartbeat, 2))
            else:
                return

    def _take_one(self) -> bool:
        """Take a trial from the queue and run it; False when none waits."""
        with ExitStack() as stack, explained_storage(self.config.storage):
            stack.enter_context(locked(self.config.storage))
            optuna.storages.fail_stale_trials(self.study)
            if not any(trial.state == TrialState.WAITING for trial in slots(self.study)):
                return False
            self.release = stack.close  # called as soon as the trial is ours: others take theirs meanwhile
            try:
                self.study.optimize(self._objective, n_trials=1, catch=(Exception,), callbacks=[self._after])
            except (ValueError, AssertionError):
                if not self._was_given_up():
                    raise
                self.say(f"trial {self.current}: this worker was silent too long, another has it now")
        if self.fatal:
            raise self.fatal
        return True

    def _was_given_up(self) -> bool:
        """Whether another worker took this one for dead and gave its trial away."""
        trials = self.study.get_trials(deepcopy=False)
        return any(self.current in trial.system_attrs.get("retry_history", []) for trial in trials)

    def _objective(self, trial: Trial) -> float:
        self.release()
        self.current = trial.number
        try:
            config = suggest(trial, self.config)
            with open_run(_run_name(trial.number), parent=self.parent.run_id, stops=False, again=AGAIN) as tracker:
                trial.set_user_attr(RUN, tracker.run_id)
                return self._train(trial, config, tracker)
        except Pruned as error:
            raise optuna.TrialPruned(str(error)) from error
        except Stopped as error:
            raise KeyboardInterrupt from error
        except Exception as error:
            if isinstance(error, MachineError):  # every other trial would fail of it, too
                self.fatal = error
            trial.set_user_attr(ERROR, f"{type(error).__name__}: {error}"[:2000])
            raise

    def _train(self, trial: Trial, config: TrainConfig, tracker: MlflowTracker) -> float:
        """The objective over all seeds; the model of the first is kept in case it is the best."""
        tracker.params(flatten(config))
        tracker.tags({"strategy": config.strategy, "trial": str(trial.number), "cxr.kind": "trial"})
        values: list[float] = []
        try:
            with memory_explained():
                for number in range(self.config.seeds):
                    values.append(self._train_seed(trial, replace(config, seed=config.seed + number), tracker, number))
                    if self.config.seeds > 1:
                        judged = values[-1] if self.config.pruner == "WilcoxonPruner" else float(np.mean(values))
                        self._report(trial, judged, number, "seed")
        finally:
            shutil.rmtree(checkpoint_folder(config, tracker.run_id), ignore_errors=True)
        mean = float(np.mean(values))
        tracker.metrics({"objective": mean})
        return mean

    def _train_seed(self, trial: Trial, config: TrainConfig, tracker: MlflowTracker, number: int) -> float:
        seed_everything(config.seed, self.machine.device)
        model, _ = build_model(config.arch, config.weights, config.seed)
        model.to(device=self.machine.device, memory_format=torch.channels_last)
        objective = self.config.objective

        def watch(record: EpochRecord) -> None:
            if self.config.seeds == 1:
                self._report(trial, record.metrics[objective], record.epoch, "epoch")

        label = f"seed{number}_" if number else ""
        records, _ = train_model(
            config, tracker, self.data, self.machine, model, _unsaid, watch, label, self.config.trials
        )
        if number == 0:
            self.model = model
        return [record for record in records if record.improved][-1].metrics[objective]  # of the epoch that is kept

    def _report(self, trial: Trial, value: float, step: int, unit: str) -> None:
        trial.report(value, step)
        if trial.should_prune():
            raise Pruned(f"pruned by {self.config.pruner} at {unit} {step}: {self.config.objective} {value:.4f}")

    def _after(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Say what came out; keep the weights of the best trial and of no other."""
        self.say(self._line(trial))
        if trial.state != TrialState.COMPLETE:
            return
        with locked(self.config.storage):
            if study.best_trial.number == trial.number:
                self._keep_weights(trial)

    def _line(self, trial: FrozenTrial) -> str:
        parameters = "  ".join(f"{name} {value:.3g}" for name, value in trial.params.items())
        done = sum(slot.state not in OPEN for slot in slots(self.study))
        head = f"trial {trial.number:3}  {trial.state.name.lower():8} {done}/{self.config.trials}"
        if trial.state == TrialState.COMPLETE:
            best = self.study.best_trial
            star = "  *" if best.number == trial.number else ""
            return f"{head}  {self.config.objective} {trial.value:.4f} (best {best.value:.4f})  {parameters}{star}"
        reason = trial.user_attrs.get(ERROR, "") if trial.state == TrialState.FAIL else ""
        return f"{head}  after {len(trial.intermediate_values)} reports  {parameters}  {reason}".rstrip()

    def _keep_weights(self, trial: FrozenTrial) -> None:
        assert self.model is not None
        config = trial_config(self.config, trial.params)
        with tempfile.TemporaryDirectory() as work:
            save_package(Path(work), self.model.state_dict(), card_of(config, self.weights, self.data.fingerprint))
            keep_only(self.parent.run_id, trial.user_attrs[RUN], Path(work))

    def _give_up_if_hopeless(self) -> None:
        settled = [trial for trial in slots(self.study) if trial.state not in OPEN]
        if len(settled) >= HOPELESS and all(trial.state == TrialState.FAIL for trial in settled):
            last = settled[-1].user_attrs.get(ERROR, "unknown")
            raise UserError(f"the first {len(settled)} trials all failed, the last with: {last}; mend that and go on")

    def interrupt(self, number: int, frame: FrameType | None) -> None:
        """The first Ctrl-C ends the search after the running trial; a second, or SIGTERM, at once."""
        if self.stopping or number == signal.SIGTERM:
            raise KeyboardInterrupt
        self.stopping = True
        self.say("stopping after this trial; Ctrl-C again to stop at once")


def _run_name(trial: int) -> str:
    return f"trial-{trial:03}"


def _unsaid(line: str) -> None:
    """What a trial's epochs have to say: a trial has one line, when it ends."""


def tune_tracked(config: TuneConfig, say: Say = print) -> RunResult | None:
    """Search, then train the winner. Returns the winner's run; None without `refit`, or if another worker has it.

    The same call again continues the study in the same parent run. Raises `UserError` for bad input, and
    `KeyboardInterrupt` once it was asked to stop; every trial is in order then.
    """
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)  # our own lines and the runs say it
    train = config.train
    whole = read_data(train)
    if train.strict:
        audited(train, whole, None)
    _, weights = build_model(train.arch, train.weights, train.seed)  # what cannot be had is no trial's failure
    worker = Worker(config, whole.without("test"), weights, say)
    worker.open()
    say(f"study {worker.study.study_name} in {without_password(config.storage)}: {_counts(worker.study)}")
    with ending(worker.parent.run_id):
        with explained_storage(config.storage):
            try:
                _work(worker)
            finally:
                _publish(worker)
        result = _refit(worker) if config.refit else None
    say("\n" + "\n".join(_summary(worker, result)))
    return result


def _work(worker: Worker) -> None:
    """Run trials; one that was broken off at once goes back to the queue."""
    with handlers({signal.SIGINT: worker.interrupt, signal.SIGTERM: worker.interrupt}):
        try:
            worker.work()
        except (KeyboardInterrupt, MachineError):
            broken = [trial for trial in slots(worker.study) if trial.number == worker.current]
            if broken and broken[0].state == TrialState.FAIL:
                requeue(worker.study, broken[0])
            raise
    if worker.stopping:
        raise KeyboardInterrupt


def _counts(study: optuna.Study) -> str:
    states = [trial.state for trial in slots(study)]
    counted = ((state.name.lower(), states.count(state)) for state in TrialState)
    return ", ".join(f"{count} {name}" for name, count in counted if count)


def _publish(worker: Worker) -> None:
    """The trials table, Optuna's figures and the best parameters, in the parent run."""
    study, parent, objective = worker.study, worker.parent, worker.config.objective
    parent.table(trials_table(study), "search/trials.csv")
    for kind, figure in study_figures(study, objective).items():
        parent.figure(figure, f"search/{kind}.png")
    parent.metrics({f"trials_{s.name.lower()}": sum(t.state == s for t in slots(study)) for s in TrialState})
    if best := _best(study):
        parent.text(
            json.dumps({"trial": best.number, "value": best.value, **best.params}, indent=2), "search/best.json"
        )
        parent.metrics({f"best_{objective}": best.value or 0.0})
        parent.tags({"best_trial": str(best.number), **{f"best.{k}": repr(v) for k, v in best.params.items()}})
    parent.tags({"mlflow.note.content": "\n\n".join(_outcome(worker))})


def _best(study: optuna.Study) -> FrozenTrial | None:
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return study.best_trial if complete else None


def _refit(worker: Worker) -> RunResult | None:
    """Train the winner as `train` does, in a child run of its own; one worker does it, and a crash is resumed."""
    study, best = worker.study, _best(worker.study)
    if best is None:
        raise UserError(f"study {study.study_name}: no trial was completed, so there is no winner to train")
    config = trial_config(worker.config, best.params)
    with explained_storage(worker.config.storage), locked(worker.config.storage):
        claim = study.user_attrs.get(REFIT, {})
        if claim.get("trial") != best.number or is_lost(claim["run"], config):
            claim = {"trial": best.number, "run": _refit_run(worker, best)}
            study.set_user_attr(REFIT, claim)
    if is_finished(claim["run"]):
        worker.say(f"refit: finished before, in run {claim['run']}")
        return None
    worker.say(f"refit of trial {best.number}, in run {claim['run']}")
    try:
        return run_tracked(config, worker.say, claim["run"], worker.parent.run_id)
    except InUseError as error:
        worker.say(f"refit: another worker is at it ({error})")
        return None


def _refit_run(worker: Worker, best: FrozenTrial) -> str:
    """The run to be, with its parameters recorded: whatever happens now, `train --resume` knows what to do."""
    config = trial_config(worker.config, best.params)
    tags = {"cxr.kind": "refit", "trial": str(best.number), "strategy": config.strategy}
    return make_child(worker.parent.run_id, f"refit-trial-{best.number:03}", tags, flatten(config))


def _outcome(worker: Worker) -> list[str]:
    study, best, objective = worker.study, _best(worker.study), worker.config.objective
    lines = [f"study {study.study_name}: {_counts(study)}"]
    if best is None:
        return [*lines, "no trial was completed"]
    chosen = ", ".join(f"{name} {value:.4g}" for name, value in best.params.items())
    lines.append(f"best: trial {best.number}, {objective} {best.value:.4f}, with {chosen}")
    first = slots(study)[0]
    if first.state == TrialState.COMPLETE:
        lines.append(f"the defaults (trial {first.number}): {objective} {first.value:.4f}")
    return lines


def _summary(worker: Worker, result: RunResult | None) -> list[str]:
    """Lines for a person: what won, where to look, what to do next."""
    config = worker.config
    lines = _outcome(worker)
    if result:
        test = ", ".join(f"{m} {format_interval(result.test.interval(m))}" for m in ("accuracy", "roc_auc"))
        lines += [f"the winner, trained again, on test: {test}", result.registered]
    return [
        *lines,
        *(f"look: {where}" for where in worker.parent.where()),
        f"look: uv tool run optuna-dashboard {without_password(config.storage)}",
        f"next: more trials with --study {worker.study.study_name} --trials {config.trials * 2}, or another --strategy",
    ]
