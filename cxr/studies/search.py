"""Hyperparameter search: each trial of a study is a child run of one parent run.

All trials use the same seeds and split (common random numbers), so that they differ only in their parameters. The test
split is not loaded during a search; only the refit of the best trial, an ordinary run, uses it. Trials wait in a queue
in the study, which any number of workers can share; the trial of a dead worker is requeued (Optuna's heartbeat).
"""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass
from types import FrameType

import optuna
from optuna.trial import FrozenTrial

from cxr.config import TrainConfig, TuneConfig, flatten, own_parameters, without_password
from cxr.data.load import read_data
from cxr.errors import InUseError, MachineError, UserError
from cxr.machine import ready_machine
from cxr.network.resnet import build_model
from cxr.runs.audit import audited
from cxr.runs.messages import Say
from cxr.runs.result import RunResult
from cxr.runs.resume import has_parameters, is_lost, remove_finished
from cxr.runs.train import run_tracked
from cxr.studies.optuna_study import (
    MAX_RETRIES,
    PARENT,
    REFIT,
    locked,
    open_study,
    requeue,
    storage_errors,
    trial_config,
)
from cxr.studies.patient_storage import STORAGE
from cxr.studies.search_report import best_trial, count_states, publish, summary, trial_line
from cxr.studies.trial import Search, TrialRunner, run_name
from cxr.studies.trial_queue import TrialQueue
from cxr.tracking.nested import (
    children,
    end,
    ending,
    is_finished,
    join_parent,
    make_child,
    open_parent,
    retire,
    unfinished_parent,
)
from cxr.tracking.outage import OUTAGE
from cxr.tracking.reading import RunKind, Tag
from cxr.tracking.signals import handlers, in_transaction, send_again


@dataclass(frozen=True, slots=True)
class Worker:
    """One process that runs trials of a study."""

    search: Search
    study: optuna.Study
    queue: TrialQueue
    runner: TrialRunner
    say: Say

    def work(self) -> None:
        """Run trials until none is left; an interrupted trial is queued again.

        The first Ctrl-C stops the search after the current trial; a second one, or SIGTERM, immediately. Raises
        `KeyboardInterrupt` if it was stopped.
        """
        with handlers({signal.SIGINT: self._interrupt, signal.SIGTERM: self._interrupt}):
            try:
                self.queue.work(self.runner.objective, self._finished)
            except (KeyboardInterrupt, MachineError):
                self.queue.requeue_interrupted()
                raise
        if self.queue.stopping:
            raise KeyboardInterrupt

    def _finished(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self.say(trial_line(study, trial, self.search.config))
        self.runner.keep_if_best(study, trial)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if in_transaction(frame):
            send_again(number)
            return
        if self.queue.stopping or number == signal.SIGTERM:
            raise KeyboardInterrupt
        self.queue.stop()
        self.say("stopping after the current trial; press Ctrl-C again to stop immediately")


def tune_tracked(config: TuneConfig, say: Say = print) -> RunResult | None:
    """Search, then refit the best trial. Returns the refit; None without `refit`, or if another worker trains it.

    Repeating the call continues the study in the same parent run. Raises `UserError` for invalid input, and
    `KeyboardInterrupt` if it was stopped, with every trial finished or queued again.
    """
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)  # the search prints its own lines
    worker = open_worker(config, say)
    study, parent = worker.study, worker.search.parent
    remove_finished(config.train)
    say(f"study {study.study_name} in {without_password(config.storage)}: {count_states(study)}")
    with STORAGE.restored():
        with ending(parent.run_id):
            for outage in (OUTAGE, STORAGE):
                outage.allow(config.train.tracking_patience, say)
            with storage_errors(config.storage):
                try:
                    worker.work()
                finally:
                    publish(study, parent, config)
            winner = _refit(worker) if config.refit else None
        with storage_errors(config.storage):
            say("\n" + "\n".join(summary(study, parent, config, winner)))
    return winner


def open_worker(config: TuneConfig, say: Say) -> Worker:
    """Create or continue the study and its parent run. Raises `UserError` for invalid input before creating either."""
    train = config.train
    data = read_data(train)
    if train.strict:
        audited(train, data, None)
    # Missing weights fail here, not in every trial.
    _, weights = build_model(train.arch, train.weights, train.seed, len(data.task.classes), train.image_size)
    machine = ready_machine(train)
    origin = {"data": data.without("test").fingerprint, "weights": str(weights)}
    study = open_study(config, origin, lambda key: _make_parent(config, origin, key), _on_stale)
    search = Search(config, data.without("test"), weights, machine, join_parent(str(study.user_attrs[PARENT])))
    return Worker(search, study, TrialQueue(study, config.storage, config.heartbeat, say), TrialRunner(search), say)


def _make_parent(config: TuneConfig, origin: dict[str, str], key: str) -> str:
    train = config.train
    tags: dict[str, str] = {
        Tag.STRATEGY: train.strategy,
        Tag.DATA_FINGERPRINT: origin["data"],
        Tag.KIND: RunKind.SEARCH,
        RunKind.SEARCH.key_tag: key,
    }
    name = f"tune-{train.strategy}-s{train.seed}"
    made = unfinished_parent(RunKind.SEARCH.key_tag, key)
    return open_parent(name, tags, {**flatten(train), **own_parameters(config)}, made)


def _on_stale(study: optuna.Study, trial: FrozenTrial) -> None:
    """A worker stopped sending heartbeats: requeue its trial and end its run."""
    requeue(study, trial, MAX_RETRIES)
    for run in children(str(study.user_attrs[PARENT])):  # by name: a worker may die before the study knows its run
        if run.name == run_name(trial.number) and run.status in ("RUNNING", "FINISHED"):
            end(run.run_id, "KILLED", "its worker stopped sending heartbeats; the trial was queued again")


def _refit(worker: Worker) -> RunResult | None:
    """Train the best parameters as `train` does, in a child run; only one worker does it, and a crash is resumed."""
    study, search, best = worker.study, worker.search, best_trial(worker.study)
    if best is None:
        raise UserError(f"study {study.study_name}: no trial was completed, so there is nothing to refit")
    config = trial_config(search.config, best.params)
    run_id = _claim_refit(worker, best, config)
    if is_finished(run_id):
        worker.say(f"refit: already finished, run {run_id}")
        return None
    worker.say(f"refit of trial {best.number}: run {run_id}")
    try:
        return run_tracked(config, worker.say, run_id, search.parent.run_id)
    except InUseError as error:
        worker.say(f"refit: another worker is training it ({error})")
        return None


def _claim_refit(worker: Worker, best: FrozenTrial, config: TrainConfig) -> str:
    """The ID of the run that trains the best trial, the same for all workers.

    Its parameters are recorded before it starts, so that `train --resume` works whenever it is interrupted.
    """
    study, storage = worker.study, worker.search.config.storage
    with storage_errors(storage), locked(storage):
        claim = study.user_attrs.get(REFIT, {})
        if claim.get("trial") != best.number or is_lost(claim["run"], config):
            tags: dict[str, str] = {Tag.KIND: RunKind.REFIT, Tag.TRIAL: str(best.number), Tag.STRATEGY: config.strategy}
            name, parent = f"refit-trial-{best.number:03}", worker.search.parent.run_id
            run_id = _unclaimed_refit(parent, claim.get("run"), tags, config)
            run_id = run_id or make_child(parent, name, tags, flatten(config))
            claim = {"trial": best.number, "run": run_id}
            study.set_user_attr(REFIT, claim)
    return str(claim["run"])


def _unclaimed_refit(parent: str, claimed: str | None, tags: Mapping[str, str], config: TrainConfig) -> str | None:
    """The ID of such a run that a worker made and, killed, could not claim; others that were left so are removed."""
    found = None
    for run in children(parent):
        if run.kind is RunKind.REFIT and run.status == "SCHEDULED" and run.run_id != claimed:
            if run.tags.get(Tag.TRIAL) == tags[Tag.TRIAL] and has_parameters(run, config):
                found = run.run_id
            else:
                retire(run)
    return found
