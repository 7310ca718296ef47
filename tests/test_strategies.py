from __future__ import annotations

import pytest

from cxr.strategies import STAGES, STRATEGIES, Phase

EVERY_PHASE = {phase for phases in STRATEGIES.values() for phase in phases}


@pytest.mark.parametrize(
    ("strategy", "trainable"),
    [
        ("frozen", [("fc",)]),
        ("partial", [("layer4", "fc")]),
        ("full", [STAGES]),
        ("gradual", [("fc",), ("layer4", "fc"), STAGES]),
    ],
)
def test_a_strategy_trains_these_stages(strategy: str, trainable: list[tuple[str, ...]]) -> None:
    assert [phase.trainable for phase in STRATEGIES[strategy]] == trainable


def test_there_are_four_strategies() -> None:
    assert list(STRATEGIES) == ["frozen", "partial", "full", "gradual"]


@pytest.mark.parametrize("first", STAGES)
def test_frozen_and_trainable_stages_are_the_whole_network_in_order(first: str) -> None:
    phase = Phase("any", first, "lr_any")
    assert phase.frozen + phase.trainable == STAGES
    assert phase.trainable[0] == first


def test_each_phase_has_a_unique_name_and_learning_rate() -> None:
    assert len({phase.name for phase in EVERY_PHASE}) == len(EVERY_PHASE) == 3
    assert {phase.lr for phase in EVERY_PHASE} == {"lr_head", "lr_top", "lr_all"}


def test_later_phases_of_a_strategy_train_more_stages() -> None:
    sizes = [len(phase.trainable) for phase in STRATEGIES["gradual"]]
    assert sizes == sorted(set(sizes))
