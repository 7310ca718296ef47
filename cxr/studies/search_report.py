"""The output of a search: a line per trial, tables and figures in the parent run, the summary."""

from __future__ import annotations

import json

import optuna
from optuna.trial import FrozenTrial, TrialState

from cxr.config import TuneConfig, without_password
from cxr.evaluation.report import format_interval
from cxr.runs.result import RunResult
from cxr.studies.optuna_study import ERROR, OPEN, locked, slots, study_figures, trials_table
from cxr.tracking.reading import Artifact, RunKind, Tag, metric_history, plot_path
from cxr.tracking.tracker import MlflowTracker


def best_trial(study: optuna.Study) -> FrozenTrial | None:
    """The best completed trial, if any."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return study.best_trial if complete else None


def count_states(study: optuna.Study) -> str:
    """The number of trials in each state: `3 complete, 1 waiting`."""
    states = [trial.state for trial in slots(study)]
    counted = ((state.name.lower(), states.count(state)) for state in TrialState)
    return ", ".join(f"{count} {name}" for name, count in counted if count)


def trial_line(study: optuna.Study, trial: FrozenTrial, config: TuneConfig) -> str:
    """A finished trial as one line; `*` marks the best so far."""
    parameters = "  ".join(f"{name} {value:.3g}" for name, value in trial.params.items())
    done = sum(slot.state not in OPEN for slot in slots(study))
    head = f"trial {trial.number:3}  {trial.state.name.lower():8} {done}/{config.trials}"
    if trial.state == TrialState.COMPLETE:
        best = study.best_trial
        star = "  *" if best.number == trial.number else ""
        return f"{head}  {config.objective} {trial.value:.4f} (best {best.value:.4f})  {parameters}{star}"
    reason = trial.user_attrs.get(ERROR, "") if trial.state == TrialState.FAIL else ""
    return f"{head}  after {len(trial.intermediate_values)} reports  {parameters}  {reason}".rstrip()


def publish(study: optuna.Study, parent: MlflowTracker, config: TuneConfig) -> None:
    """Log the table of trials, Optuna's figures and the best parameters to the parent run."""
    parent.table(trials_table(study), Artifact.TRIALS)
    for kind, figure in study_figures(study, config.objective).items():
        parent.figure(figure, plot_path(kind, "search"))
    counts = {f"trials_{state.name.lower()}": 0.0 for state in TrialState}
    for trial in slots(study):
        counts[f"trials_{trial.state.name.lower()}"] += 1
    if best := best_trial(study):
        content = {"trial": best.number, "value": best.value, **best.params}
        parent.text(json.dumps(content, indent=2), Artifact.BEST_PARAMETERS)
        counts[f"best_{config.objective}"] = best.value or 0.0
        parent.tags({Tag.BEST_TRIAL: str(best.number), **{f"best.{k}": repr(v) for k, v in best.params.items()}})
    with locked(config.storage):  # each worker adds a step, and so does one that goes on with the study
        parent.metrics(counts, step=len(metric_history(parent.run_id, "trials_complete")))
    parent.tags({Tag.DESCRIPTION: "\n\n".join(_outcome(study, config))})


def _outcome(study: optuna.Study, config: TuneConfig) -> list[str]:
    best, objective = best_trial(study), config.objective
    lines = [f"study {study.study_name}: {count_states(study)}"]
    if best is None:
        return [*lines, "no trial was completed"]
    chosen = ", ".join(f"{name} {value:.4g}" for name, value in best.params.items())
    lines.append(f"best: trial {best.number}, {objective} {best.value:.4f}, with {chosen}")
    first = next(trial for trial in slots(study) if 0 in (trial.number, *trial.system_attrs.get("retry_history", [])))
    if first.state == TrialState.COMPLETE:
        lines.append(f"the defaults (trial {first.number}): {objective} {first.value:.4f}")
    return lines


def summary(study: optuna.Study, parent: MlflowTracker, config: TuneConfig, winner: RunResult | None) -> list[str]:
    """The summary: the best trial, where to find the results, possible next commands."""
    rates = [f"train.{name}" for name in config.searched()]
    lines = _outcome(study, config)
    if winner:
        test = ", ".join(f"{m} {format_interval(winner.test.interval(m))}" for m in ("accuracy", "roc_auc"))
        lines += [f"refit of the best trial, on test: {test}", winner.registered]
    return [
        *lines,
        *(f"look: {where}" for where in parent.where(RunKind.SEARCH, rates)),
        f"look: uv tool run optuna-dashboard {without_password(config.storage)}",
        f"next: more trials with --study {study.study_name} --trials {config.trials * 2}, or another --strategy",
    ]
