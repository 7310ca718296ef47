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

HOPELESS = 3  # failed trials before the first success that cannot be an accident
Objective = Callable[[Trial], float]
Finished = Callable[[optuna.Study, FrozenTrial], None]


class TrialQueue:
    """One worker's access to the queue of a study in `storage`; `heartbeat` is the seconds between its heartbeats."""

    def __init__(self, study: optuna.Study, storage: str, heartbeat: int, say: Say):
        self.study, self.storage, self.heartbeat, self.say = study, storage, heartbeat, say
        self.stopping = False
        self.current = -1  # the number of the trial that this worker took last
        self._fatal: MachineError | None = None

    def work(self, objective: Objective, finished: Finished) -> None:
        """Run trials until none is left, in this worker or any other, or until asked to stop.

        Raises `UserError` when the first trials all fail, `MachineError` for an error that every trial would meet.
        """
        while not self.stopping:
            if self._take_one(objective, finished):
                self._give_up_if_hopeless()
            elif any(trial.state in OPEN for trial in slots(self.study)):
                time.sleep(min(self.heartbeat, 2))
            else:
                return

    def stop(self) -> None:
        """Take no more trials."""
        self.stopping = True

    def requeue_broken_off(self) -> None:
        """Put the last trial back if it failed because this worker was stopped."""
        broken = [trial for trial in slots(self.study) if trial.number == self.current]
        if broken and broken[0].state == TrialState.FAIL:
            requeue(self.study, broken[0])

    def _take_one(self, objective: Objective, finished: Finished) -> bool:
        """Take a waiting trial and run it; False when none waits."""
        with ExitStack() as lock, storage_errors(self.storage):
            lock.enter_context(locked(self.storage))
            optuna.storages.fail_stale_trials(self.study)
            if not any(trial.state == TrialState.WAITING for trial in slots(self.study)):
                return False

            def taken(trial: Trial) -> float:
                lock.close()  # the trial is ours: other workers take theirs meanwhile
                return self._run(trial, objective)

            try:
                self.study.optimize(taken, n_trials=1, catch=(Exception,), callbacks=[finished])
            except (ValueError, AssertionError):
                if not self._was_given_up():
                    raise
                self.say(f"trial {self.current}: this worker sent no heartbeat for too long, another one has the trial")
        if self._fatal:
            raise self._fatal
        return True

    def _run(self, trial: Trial, objective: Objective) -> float:
        self.current = trial.number
        try:
            return objective(trial)
        except MachineError as error:  # every other trial would fail with it
            self._fatal = error
            raise

    def _was_given_up(self) -> bool:
        """Whether another worker took this one for dead and retried its trial."""
        trials = self.study.get_trials(deepcopy=False)
        return any(self.current in trial.system_attrs.get("retry_history", []) for trial in trials)

    def _give_up_if_hopeless(self) -> None:
        settled = [trial for trial in slots(self.study) if trial.state not in OPEN]
        if len(settled) >= HOPELESS and all(trial.state == TrialState.FAIL for trial in settled):
            last = settled[-1].user_attrs.get(ERROR, "unknown")
            raise UserError(
                f"the first {len(settled)} trials all failed, the last with: {last}; fix that and start again"
            )
