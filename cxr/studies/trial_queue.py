"""The queue of a study's trials, which any number of workers share."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from cxr.errors import MachineError, UserError
from cxr.runs.messages import Say
from cxr.studies.optuna_study import ERROR, OPEN, locked, requeue, slots, storage_errors

MAX_INITIAL_FAILURES = 3  # failed trials before the first success after which a search stops
Objective = Callable[[Trial], float]
Finished = Callable[[optuna.Study, FrozenTrial], None]


class TrialQueue:
    """The access of one worker to the queue of a study in `storage`, with `heartbeat` seconds between its
    heartbeats."""

    def __init__(self, study: optuna.Study, storage: str, heartbeat: int, say: Say):
        self.study, self.storage, self.heartbeat, self.say = study, storage, heartbeat, say
        self.stopping = False
        self.current = -1  # number of the last trial that this worker took
        self._fatal: MachineError | None = None

    def work(self, objective: Objective, finished: Finished) -> None:
        """Run trials until none is left in any worker, or until `stop`.

        Raises `UserError` if the first trials all fail, `MachineError` for an error that would affect every trial.
        """
        while not self.stopping:
            if self._take_one(objective, finished):
                self._stop_if_all_failed()
            elif any(trial.state in OPEN for trial in slots(self.study)):
                time.sleep(min(self.heartbeat, 2))
            else:
                return

    def stop(self) -> None:
        """Take no more trials."""
        self.stopping = True

    def requeue_interrupted(self) -> None:
        """Queue the last trial again if it failed because this worker was stopped."""
        with locked(self.storage):  # a worker that begins may do so, too
            interrupted = [trial for trial in slots(self.study) if trial.number == self.current]
            if interrupted and interrupted[0].state == TrialState.FAIL:
                requeue(self.study, interrupted[0])

    def _take_one(self, objective: Objective, finished: Finished) -> bool:
        """Take a waiting trial and run it; False if none is waiting."""
        with ExitStack() as lock, storage_errors(self.storage):
            lock.enter_context(locked(self.storage))
            optuna.storages.fail_stale_trials(self.study)
            if not any(trial.state == TrialState.WAITING for trial in slots(self.study)):
                return False

            def run_unlocked(trial: Trial) -> float:
                lock.close()  # the trial is taken, so other workers may take theirs
                return self._run(trial, objective)

            try:
                self.study.optimize(run_unlocked, n_trials=1, catch=(Exception,), callbacks=[finished])
            except (ValueError, AssertionError):
                if not self._was_requeued():
                    raise
                self.say(f"trial {self.current}: this worker missed its heartbeats, so the trial was requeued")
        if self._fatal:
            raise self._fatal
        return True

    def _run(self, trial: Trial, objective: Objective) -> float:
        self.current = trial.number
        try:
            return objective(trial)
        except MachineError as error:  # would affect every other trial
            self._fatal = error
            raise

    def _was_requeued(self) -> bool:
        """Whether another worker considered this one dead and requeued its trial."""
        trials = self.study.get_trials(deepcopy=False)
        return any(self.current in trial.system_attrs.get("retry_history", []) for trial in trials)

    def _stop_if_all_failed(self) -> None:
        settled = [trial for trial in slots(self.study) if trial.state not in OPEN]
        if len(settled) >= MAX_INITIAL_FAILURES and all(trial.state == TrialState.FAIL for trial in settled):
            last = settled[-1].user_attrs.get(ERROR, "unknown")
            raise UserError(
                f"the first {len(settled)} trials all failed, the last with: {last}; fix the cause and restart"
            )
