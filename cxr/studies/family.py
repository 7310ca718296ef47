"""A parent run with training runs as children, which are created or resumed."""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

from cxr.config import FamilyConfig, TrainConfig, flatten, own_parameters, result_parameters
from cxr.data.load import Data, read_data
from cxr.machine import Machine, cores, ready_machine
from cxr.network.resnet import build_model, ready_model
from cxr.runs.audit import audited
from cxr.runs.messages import Say
from cxr.runs.resume import can_continue, checkpoints_of, has_parameters, remove_finished
from cxr.storage import exclusive
from cxr.studies.child import Child
from cxr.studies.on_ray import train_on_ray
from cxr.studies.side_by_side import at_once, train_side_by_side
from cxr.studies.worker import warm_up
from cxr.tracking.nested import (
    children,
    ending,
    join_parent,
    make_child,
    open_parent,
    retire,
    unfinished_parent,
)
from cxr.tracking.outage import OUTAGE
from cxr.tracking.reading import LoggedRun, RunKind, Tag
from cxr.tracking.store import one_at_a_time
from cxr.tracking.tracker import MlflowTracker


@contextmanager
def run_family(
    config: FamilyConfig,
    members: Mapping[str, TrainConfig],
    name: str,
    tags: Mapping[str, str],
    say: Say,
) -> Iterator[tuple[MlflowTracker, list[str]]]:
    """Run `members` (name -> configuration) as child runs of one parent run.

    Yields (the parent, the IDs of its finished children); the parent ends with the block. A new parent gets `name`,
    `tags`, and the command's own parameters in addition to those of the children. Repeating the call after an
    interruption continues in the same parent: finished children are reused, others are resumed. Raises `UserError` for
    invalid input before a run is created.
    """
    data, machine = read_data(next(iter(members.values()))), ready_machine(config.train)
    threads = config.train.threads or _share(len(members))
    if config.engine == "local" and at_once(config.jobs, len(members), machine, threads)[0] > 1:
        warm_up(threads)
    kind = RunKind(tags[Tag.KIND])
    key = _family_key(members.values(), data.fingerprint, *_weights(config.train, members.values(), data))
    params = flatten(config.train) | own_parameters(config)
    with one_at_a_time():  # or the same command, given twice, could make two
        made = unfinished_parent(kind.key_tag, key)
        run_id = open_parent(name, {**tags, kind.key_tag: key}, params, made)
    remove_finished(config.train)
    with exclusive(checkpoints_of(config.train, run_id)), ending(run_id):
        parent = join_parent(run_id)
        parent.tags({Tag.HOST: socket.gethostname()})
        existing = {run.tags.get(Tag.MEMBER, ""): run for run in children(run_id)}
        finished = [run for run in existing.values() if run.finished]
        for run in finished:
            say(f"{run.name}: already finished, run {run.run_id}")
        # Whether a checkpoint is there, only the node of a Ray cluster knows that is to continue from it.
        continues = has_parameters if config.engine == "ray" else can_continue
        family = [*_children(run_id, members, existing, continues)]
        done = {run.run_id for run in finished}
        OUTAGE.allow(config.train.tracking_patience, say)
        _train(config, data, machine, [child for child in family if child.run_id not in done], say)
        yield parent, [child.run_id for child in family]


def _children(
    parent: str,
    members: Mapping[str, TrainConfig],
    existing: Mapping[str, LoggedRun],
    continues: Callable[[LoggedRun, TrainConfig], bool],
) -> Iterator[Child]:
    """All children, in order: the `existing` ones (by name) that are finished or continue, else new ones, SCHEDULED
    until they begin."""
    for name, member in members.items():
        config, child = replace(member, threads=member.threads or _share(len(members))), existing.get(name)
        if child is not None and (child.finished or continues(child, config)):
            yield Child(name, config, child.run_id, parent)
            continue
        if child is not None:
            retire(child)
        yield Child(name, config, _new_child(parent, name, config), parent)


def _share(members: int) -> int:
    """The threads of each, whose number may change the last bits of a result: how many are at work must not."""
    return max(1, cores() // members)


def _train(config: FamilyConfig, data: Data, machine: Machine, family: Sequence[Child], say: Say) -> None:
    """Train what is not finished, one after the other in this process, or side by side in others."""
    if not family:
        return
    say(f"to be trained: {', '.join(child.name for child in family)}")
    if config.engine == "ray":
        _audit(family[0].config, data, machine)
        train_on_ray(family, None if config.jobs == "auto" else int(config.jobs), say, _renewed)
        return
    processes, why = at_once(config.jobs, len(family), machine, family[0].config.threads)
    say(f"{processes} at once ({why})")
    if processes == 1:
        for child in family:
            say(f"{child.name}: run {child.run_id}")
            child.train(say)
        return
    train_side_by_side(family, processes, say, lambda: _audit(family[0].config, data, machine))


def _audit(config: TrainConfig, data: Data, machine: Machine) -> None:
    """Made here once, and kept for all runs, which would each make it."""
    model, _ = ready_model(config, len(data.task.classes), machine.device)
    audited(config, data, model, machine.precision)


def _renewed(child: Child) -> Child:
    """The same in a new run."""
    return replace(child, run_id=_new_child(child.parent, child.name, child.config))


def _weights(config: TrainConfig, members: Iterable[TrainConfig], data: Data) -> list[str]:
    """The initial weights of each backbone in use. Raises `UserError` if they are unavailable or do not fit."""
    archs = dict.fromkeys(member.arch for member in members)
    about = (config.weights, config.seed, len(data.task.classes), config.image_size)
    return [str(build_model(arch, *about)[1]) for arch in archs]


def _family_key(members: Iterable[TrainConfig], *origin: str) -> str:
    """Identifies a comparison or cross-validation by its runs, data and weights."""
    text = json.dumps([*origin, *(result_parameters(member) for member in members)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _new_child(parent: str, name: str, config: TrainConfig) -> str:
    tags: dict[str, str] = {
        Tag.KIND: RunKind.MEMBER,
        Tag.MEMBER: name,
        Tag.STRATEGY: config.strategy,
        Tag.SEED: str(config.seed),
    }
    return make_child(parent, name, tags, flatten(config))
