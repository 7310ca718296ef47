"""What is kept, decided from costs and limits alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxr.config import TrainConfig
from cxr.runs.messages import reuse_lines
from cxr.strategies import ALL, HEAD, STRATEGIES, TOP
from cxr.training.reuse import DISK, Decision, PrefixCost, Workload, plan_reuse

GRADUAL = STRATEGIES["gradual"]
WORK = Workload(train=100, val=20, image_bytes=1000, views=4, stressed=120, epochs=10)
COSTS = {"head": PrefixCost(100, 1.0), "top": PrefixCost(400, 1.0)}


def test_all_is_kept_where_there_is_room_and_a_phase_starts_from_the_next_one() -> None:
    head, top, every = plan_reuse(GRADUAL, COSTS, WORK, 1e9, on_disk=True).phases
    assert (head.decision, head.base, head.bytes) == (Decision.KEPT_ON_DISK, "top", 100 * WORK.outputs())
    assert (top.decision, top.base) == (Decision.KEPT_ON_DISK, None)
    assert every.decision is Decision.NOTHING_FROZEN


def test_a_phase_and_its_base_share_the_budget() -> None:
    need = 400 * WORK.outputs()
    plan = plan_reuse(GRADUAL, COSTS, WORK, need, on_disk=False)
    assert [each.decision for each in plan.phases[:2]] == [Decision.TOO_LARGE, Decision.KEPT_IN_MEMORY]
    plan = plan_reuse(GRADUAL, COSTS, WORK, need - 1, on_disk=False)
    assert [each.decision for each in plan.phases[:2]] == [Decision.KEPT_IN_MEMORY, Decision.TOO_LARGE]
    assert plan.of(HEAD).base is None


@pytest.mark.parametrize(("seconds", "begun", "kept"), [(0.0, False, False), (1.0, False, True), (0.0, True, True)])
def test_on_disk_what_is_computed_faster_than_written_is_not_kept(seconds: float, begun: bool, kept: bool) -> None:
    costs = {"top": PrefixCost(400, seconds, begun)}
    plan = plan_reuse((TOP,), costs, WORK, 1e9, on_disk=True)
    assert plan.of(TOP).kept is kept
    assert kept or plan.of(TOP).decision is Decision.CHEAPER_AGAIN


def test_views_are_kept_only_if_they_are_shown_again() -> None:
    assert plan_reuse((ALL,), {}, WORK, 1e9, on_disk=True).keeps_views
    assert not plan_reuse((ALL,), {}, replace(WORK, epochs=4), 1e9, on_disk=True).keeps_views


def test_the_log_says_what_is_kept_and_why_not() -> None:
    lines = reuse_lines(plan_reuse(GRADUAL, COSTS, WORK, 100 * WORK.outputs(), on_disk=True))
    assert lines[0].startswith("reuse, phase head: kept on disk (0 MB)")
    assert lines[1].startswith("reuse, phase top: computed in each epoch: too large for --reuse-gb")
    assert lines[2] == "reuse, phase all: nothing is frozen"


@given(
    st.integers(1, 10**6),
    st.floats(0, 1),
    st.floats(0, 1e12),
    st.integers(1, 50),
    st.integers(1, 20),
    st.booleans(),
)
def test_what_is_kept_fits_and_pays(
    size: int, seconds: float, budget: float, epochs: int, runs: int, disk: bool
) -> None:
    work = replace(WORK, epochs=epochs, runs=runs)
    costs = {"head": PrefixCost(size, seconds), "top": PrefixCost(4 * size, seconds)}
    plan = plan_reuse(GRADUAL, costs, work, budget, disk)
    for each in plan.phases:
        base = next((other for other in plan.phases if other.phase == each.base), None)
        assert base is None or base.kept
        if each.kept:
            assert each.bytes + (base.bytes if base else 0) <= budget
            assert not disk or work.saved_outputs() * seconds > each.bytes / DISK


def test_the_default_run_keeps_its_activations_at_the_size_of_the_kaggle_set() -> None:
    config = TrainConfig()
    val, row = 524, 256 * 14 * 14 * 4  # layer3 in fp32
    work = Workload(4708, val, 224 * 224, config.views, stressed=4 * val, epochs=config.epochs)
    plan = plan_reuse(config.phases, {"top": PrefixCost(row, 0.01)}, work, config.reuse_gb * 1e9, on_disk=True)
    assert [each.decision for each in plan.phases] == [Decision.KEPT_ON_DISK]
