"""Training networks of every family: the loop, reuse, resuming."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
import torch
from narrow import OTHERS
from some import some

from cxr.data.batches import Split
from cxr.families import FAMILIES
from cxr.network.freezing import checksum, stage_state
from cxr.network.resnet import build_model
from cxr.network.weights import StateDict
from cxr.storage import Cache
from cxr.strategies import STRATEGIES
from cxr.training.batch_source import BatchSource, SourceSettings
from cxr.training.checkpoint import Checkpoints
from cxr.training.loop import EpochRecord, Schedule, class_weights, fit

Splits = tuple[Split, Split]
EPOCHS = 2
RATES = {"head": 1e-2, "top": 3e-3, "all": 1e-3}
SECONDS = ("epoch_seconds", "eval_seconds", "images_per_second")


class BrokenOffError(Exception):
    """Ends a run in the middle."""


@pytest.fixture(scope="module")
def few(splits: Splits) -> Splits:
    """Nine training and eight validation images of both classes."""
    return some(splits[0], 9), some(splits[1], 8)


def trained(
    arch: str, data: Splits, folder: Path, strategy: str, budget: float = 1e9, stop: int = -1, cache: Path | None = None
) -> tuple[StateDict, list[dict[str, float]], list[EpochRecord]]:
    """(the network at the end, the metrics of each epoch, the records); broken off after the epoch `stop`."""
    phases = FAMILIES[arch].phases(strategy)
    model, _ = build_model(arch, "random", 0, size=32)
    model.to(memory_format=torch.channels_last)
    schedule = Schedule(phases, tuple(RATES[p.name] for p in phases), EPOCHS, 0.0, 1, 0.5, 5, "fp32")
    settings = SourceSettings(4, 0, 2, "fp32", budget, phases, Cache(cache) if cache else None)
    source, records = BatchSource(model, *data, settings), list[EpochRecord]()
    with suppress(BrokenOffError), Checkpoints(folder) as checkpoints:
        for record in fit(model, schedule, class_weights(data[0].labels), source, checkpoints):
            records.append(record)
            if record.epoch == stop:
                raise BrokenOffError
    numbers = [{k: v for k, v in record.metrics.items() if k not in SECONDS} for record in records]
    return model.state_dict(), numbers, records


def same(left: StateDict, right: StateDict) -> bool:
    return left.keys() == right.keys() and all(torch.equal(value, right[key]) for key, value in left.items())


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("arch", OTHERS)
def test_every_strategy_trains_and_proves_its_freezing(arch: str, strategy: str, few: Splits, tmp_path: Path) -> None:
    model, _ = build_model(arch, "random", 0, size=32)
    state, numbers, records = trained(arch, few, tmp_path, strategy)
    assert len(numbers) == EPOCHS * len(STRATEGIES[strategy])
    proofs = [record.proof for record in records if record.proof]
    phases = FAMILIES[arch].phases(strategy)
    assert [proof.stages for proof in proofs] == [phase.frozen for phase in phases]
    assert all(proof.before == proof.after for proof in proofs)
    never = phases[-1].frozen
    assert all(torch.equal(state[key], value) for key, value in stage_state(model, never).items())
    before = checksum(model, phases[-1].trainable)
    model.load_state_dict(state)
    assert checksum(model, phases[-1].trainable) != before


@pytest.mark.parametrize("arch", OTHERS)
def test_a_run_that_was_broken_off_goes_on_to_the_same_result(arch: str, few: Splits, tmp_path: Path) -> None:
    """Dropout and stochastic depth draw from torch's generator, whose state the checkpoint holds."""
    state, numbers, _ = trained(arch, few, tmp_path / "whole", "gradual")
    for stop in (0, 2, 4):
        folder = tmp_path / str(stop)
        trained(arch, few, folder, "gradual", stop=stop)
        torch.manual_seed(99)
        resumed, again, records = trained(arch, few, folder, "gradual")
        assert records[stop].restored
        assert again == numbers
        assert same(resumed, state)


@pytest.mark.parametrize("strategy", ["frozen", "gradual"])
@pytest.mark.parametrize("arch", OTHERS)
def test_reuse_changes_no_number(arch: str, strategy: str, few: Splits, tmp_path: Path) -> None:
    expected = trained(arch, few, tmp_path / "none", strategy, budget=0)
    for name, cache in (("memory", None), ("disk", tmp_path / "cache"), ("disk again", tmp_path / "cache")):
        found = trained(arch, few, tmp_path / name, strategy, cache=cache)
        assert found[1] == expected[1], name
        assert same(found[0], expected[0]), name
    assert list((tmp_path / "cache").rglob("rows.bin"))
