"""A parent run with training runs as children, which are created or resumed one after the other."""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from cxr.config import TrainConfig, flatten, result_parameters
from cxr.data.load import Data, read_data
from cxr.machine import ready_machine
from cxr.network.resnet import build_model
from cxr.runs.messages import Say
from cxr.runs.resume import can_continue, checkpoints_of
from cxr.runs.train import run_tracked
from cxr.storage import exclusive
from cxr.tracking.nested import children, ending, join_parent, make_child, open_parent, unfinished_parent
from cxr.tracking.reading import LoggedRun, RunKind, Tag
from cxr.tracking.tracker import MlflowTracker


@contextmanager
def run_family(
    config: TrainConfig,
    members: Mapping[str, TrainConfig],
    name: str,
    kind: RunKind,
    tags: Mapping[str, str],
    own: Mapping[str, str],
    say: Say,
) -> Iterator[tuple[MlflowTracker, list[str]]]:
    """Run `members` (name -> configuration) as child runs of one parent run.

    Yields (the parent, the IDs of its finished children); the parent ends with the block. A new parent gets `name`, the
    tag `cxr.kind`, `tags` and, in addition to the parameters of the children, its `own`. Repeating the call after an
    interruption continues in the same parent: finished children are reused, others are resumed. Raises `UserError` for
    invalid input before a run is created.
    """
    data = read_data(next(iter(members.values())))
    ready_machine(config)
    key = _family_key(members.values(), data.fingerprint, *_weights(config, members.values(), data))
    tags = {**tags, Tag.KIND: kind, kind.key_tag: key}
    run_id = unfinished_parent(kind.key_tag, key) or open_parent(name, tags, {**flatten(config), **own})
    with exclusive(checkpoints_of(config, run_id)), ending(run_id):
        parent = join_parent(run_id)
        parent.tags({Tag.HOST: socket.gethostname()})
        existing = {child.tags.get(Tag.MEMBER, ""): child for child in children(run_id)}
        yield parent, [_run_child(run_id, existing, name, member, say) for name, member in members.items()]


def _weights(config: TrainConfig, members: Iterable[TrainConfig], data: Data) -> list[str]:
    """The initial weights of each backbone in use. Raises `UserError` if they are unavailable or do not fit."""
    archs = dict.fromkeys(member.arch for member in members)
    about = (config.weights, config.seed, len(data.task.classes), config.image_size)
    return [str(build_model(arch, *about)[1]) for arch in archs]


def _family_key(members: Iterable[TrainConfig], *origin: str) -> str:
    """Identifies a comparison or cross-validation by its runs, data and weights."""
    text = json.dumps([*origin, *(result_parameters(member) for member in members)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _run_child(parent: str, existing: Mapping[str, LoggedRun], name: str, config: TrainConfig, say: Say) -> str:
    """Finish the child run `name` of a parent and return its ID: the one in `existing` (name -> run), resumed if
    unfinished and resumable, or a new one."""
    child = existing.get(name)
    if child is not None and child.finished:
        say(f"{name}: already finished, run {child.run_id}")
        return child.run_id
    tags: dict[str, str] = {
        Tag.KIND: RunKind.MEMBER,
        Tag.MEMBER: name,
        Tag.STRATEGY: config.strategy,
        Tag.SEED: str(config.seed),
    }
    if child is not None and can_continue(child, config):
        run_id = child.run_id
    else:
        run_id = make_child(parent, name, tags, flatten(config))
    say(f"{name}: run {run_id}")
    return run_tracked(config, say, run_id, parent).run_id
