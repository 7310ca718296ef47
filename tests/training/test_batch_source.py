from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from narrow import FEATURES
from torch import Tensor
from torchvision.models import ResNet, resnet18

from cxr.data.batches import Split, epoch_order
from cxr.network.freezing import apply_phase
from cxr.strategies import ALL, HEAD, TOP, Phase
from cxr.training import batch_source
from cxr.training.batch_source import BatchSource, SourceSettings
from cxr.training.frozen_prefix import PassSettings, Prefix
from cxr.training.reuse import Decision, PhaseReuse

Splits = tuple[Split, Split]
Batches = list[tuple[Tensor, Tensor]]
BATCH, AMPLE = 8, 1e9
NOT_KEPT = PhaseReuse("top", Decision.CHEAPER_AGAIN)


def source(model: ResNet, splits: Splits, budget: float = AMPLE, views: int = 2, **options: Any) -> BatchSource:
    phases = options.pop("phases", (ALL, TOP, HEAD))  # in this order no phase starts from a later one
    precision = options.pop("precision", "fp32")
    return BatchSource(model, *splits, SourceSettings(BATCH, 5, views, precision, budget, phases, **options))


def one_epoch(data: BatchSource, phase: Phase, epoch: int) -> Batches:
    apply_phase(data.model, phase)
    data.enter(phase)
    return list(data.train(phase, epoch))


def validation(data: BatchSource, phase: Phase) -> Batches:
    apply_phase(data.model, phase)
    data.enter(phase)
    return list(data.val(phase))


def same(left: Batches, right: Batches) -> bool:
    """Bit for bit."""
    pairs = zip(left, right, strict=True)
    return all(torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in pairs)


# Bit for bit: reuse computes the prefix in another order of images, in batches of the same size but for the last.
# Each image's arithmetic is its own in eval mode; a processor on which a kernel orders its sums by the batch's size
# would fail here, and there the promise that reuse changes no number would not hold either.
@pytest.mark.parametrize("views", [0, 1, 2])
@pytest.mark.parametrize("phase", [HEAD, TOP])
def test_reuse_changes_no_number(tiny: ResNet, splits: Splits, phase: Phase, views: int) -> None:
    reused, afresh = source(tiny, splits, AMPLE, views), source(tiny, splits, 0, views)
    for epoch in range(3):
        assert same(one_epoch(reused, phase, epoch), one_epoch(afresh, phase, epoch))
        assert same(validation(reused, phase), validation(afresh, phase))


def test_reuse_changes_no_number_in_bf16(tiny: ResNet, splits: Splits) -> None:
    reused, afresh = (source(tiny, splits, budget, precision="bf16") for budget in (AMPLE, 0))
    for _ in range(2):
        assert same(validation(reused, TOP), validation(afresh, TOP))
        assert validation(reused, TOP)[0][0].dtype == torch.bfloat16


@pytest.mark.parametrize("budget", [0, AMPLE])
def test_each_epoch_has_its_own_order_and_the_views_come_round(tiny: ResNet, splits: Splits, budget: float) -> None:
    data, images = source(tiny, splits, budget), len(splits[0])
    rows = []
    for epoch in range(4):
        order = torch.cat(epoch_order(images, BATCH, 5, epoch))
        features = torch.cat([x for x, _ in one_epoch(data, HEAD, epoch)]).flatten(1)
        rows.append(torch.empty_like(features).index_copy(0, order, features))
        assert not torch.equal(rows[-1], features)
    assert torch.equal(rows[0], rows[2])
    assert torch.equal(rows[1], rows[3])
    assert not torch.isclose(rows[0], rows[1]).all(1).any()


@pytest.mark.parametrize("budget", [0, AMPLE])
def test_labels_stay_with_their_images(tiny: ResNet, splits: Splits, budget: float) -> None:
    data, (train, val) = source(tiny, splits, budget), splits
    labels = torch.cat([y for _, y in one_epoch(data, TOP, 3)])
    order = torch.cat(epoch_order(len(train), BATCH, 5, 3))
    assert torch.equal(labels, torch.from_numpy(train.labels)[order])
    assert torch.equal(torch.cat([y for _, y in validation(data, TOP)]), torch.from_numpy(val.labels))


def test_a_view_seen_before_costs_nothing(tiny: ResNet, splits: Splits, seen: list[int]) -> None:
    data, (train, val) = source(tiny, splits, AMPLE), splits
    for epoch, cost in enumerate([len(train), len(train), 0, 0]):
        seen.clear()
        one_epoch(data, TOP, epoch)
        assert sum(seen) == cost
    seen.clear()
    assert same(validation(data, TOP), validation(data, TOP))
    assert sum(seen) == len(val)


@pytest.mark.parametrize(("phase", "floats"), [(HEAD, FEATURES), (TOP, FEATURES // 2 * 2 * 2)])
def test_the_budget_is_kept_to_the_byte(
    tiny: ResNet, splits: Splits, seen: list[int], phase: Phase, floats: int
) -> None:
    need = 4 * floats * (2 * len(splits[0]) + len(splits[1]))
    for budget, again in ((need, False), (need - 1, True)):
        data = source(tiny, splits, budget)
        for epoch in range(2):
            one_epoch(data, phase, epoch)
        validation(data, phase)
        kept = sum(values.numel() * 4 for values in data.prefixes[phase.name].values.values())
        assert kept == (need if budget == need else 0)
        seen.clear()
        one_epoch(data, phase, 2)
        validation(data, phase)
        assert bool(seen) is again


def test_a_phase_that_freezes_nothing_gets_the_images(tiny: ResNet, splits: Splits) -> None:
    data = source(tiny, splits, AMPLE)
    assert one_epoch(data, ALL, 0)[0][0].shape == (BATCH, 3, 32, 32)
    assert not any(prefix.values for prefix in data.prefixes.values())


def test_another_phase_forgets_what_the_network_gave_before(tiny: ResNet, splits: Splits) -> None:
    data = source(tiny, splits, AMPLE)
    one_epoch(data, HEAD, 0)
    validation(data, HEAD)
    with torch.no_grad():  # what comes between two phases: other weights in the model
        tiny.layer1[0].bn1.bias += 0.5
    for batches, phase in ((one_epoch(data, TOP, 0), TOP), (one_epoch(data, HEAD, 0), HEAD)):
        assert same(batches, one_epoch(source(tiny, splits, 0), phase, 0))
    assert same(validation(data, HEAD), validation(source(tiny, splits, 0), HEAD))


def test_what_the_prefix_gives_carries_no_gradient(tiny: ResNet, splits: Splits) -> None:
    for budget in (0, AMPLE):
        features, _ = one_epoch(source(tiny, splits, budget), TOP, 0)[0]
        assert not features.requires_grad
        assert not features.is_inference()


@pytest.mark.parametrize("budget", [0, AMPLE])
def test_progress_is_shown_over_all_batches(tiny: ResNet, splits: Splits, budget: float) -> None:
    shown: list[tuple[int, int]] = []

    def wrap(batches: Iterable[tuple[Tensor, Tensor]], total: int) -> Batches:
        shown.append((len(whole := list(batches)), total))
        return whole

    one_epoch(source(tiny, splits, budget, progress=wrap), HEAD, 0)
    assert shown
    assert all(count == total == -(-len(splits[0]) // BATCH) for count, total in shown)


def test_a_phase_goes_on_from_what_is_kept_for_a_later_one(tiny: ResNet, splits: Splits, seen: list[int]) -> None:
    data, afresh = source(tiny, splits, phases=(HEAD, TOP, ALL)), source(tiny, splits, 0)
    for epoch in range(2):
        assert same(one_epoch(data, HEAD, epoch), one_epoch(afresh, HEAD, epoch))
    assert same(validation(data, HEAD), validation(afresh, HEAD))
    with torch.no_grad():
        tiny.fc.bias += 1  # what the phase trained
    expected = [one_epoch(afresh, TOP, epoch) for epoch in (2, 3)], validation(afresh, TOP)
    seen.clear()
    assert all(same(one_epoch(data, TOP, epoch), batches) for epoch, batches in zip((2, 3), expected[0], strict=True))
    assert same(validation(data, TOP), expected[1])
    assert not seen


def test_a_later_phase_is_not_kept_for_an_earlier_one_where_only_one_fits(tiny: ResNet, splits: Splits) -> None:
    need = 4 * FEATURES * (2 * len(splits[0]) + len(splits[1]))  # of HEAD; TOP takes twice as much
    data = source(tiny, splits, need, phases=(HEAD, TOP))
    assert same(one_epoch(data, HEAD, 0), one_epoch(source(tiny, splits, 0), HEAD, 0))
    assert [each.decision for each in data.plan.phases] == [Decision.KEPT_IN_MEMORY, Decision.TOO_LARGE]
    assert data.prefixes["head"].base is None


@pytest.mark.parametrize("views", [0, 2])
def test_views_that_are_kept_are_the_same(
    tiny: ResNet, splits: Splits, views: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, afresh = source(tiny, splits, AMPLE, views, phases=(ALL,)), source(tiny, splits, 0, views)
    assert (kept.plan.keeps_views, afresh.plan.keeps_views) == (True, False)
    assert all(same(one_epoch(kept, ALL, epoch), one_epoch(afresh, ALL, epoch)) for epoch in range(2))
    assert same(list(kept.stressed(ALL)), list(afresh.stressed(ALL)))
    monkeypatch.setattr("cxr.training.batch_source.grey_batches", None)
    assert same(one_epoch(kept, ALL, 2), one_epoch(afresh, ALL, 2))


def test_a_prefix_that_is_not_kept_sees_views_that_are(
    tiny: ResNet, splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = batch_source.plan_reuse
    monkeypatch.setattr(batch_source, "plan_reuse", lambda *about: replace(planned(*about), phases=(NOT_KEPT,)))
    data, afresh = source(tiny, splits, AMPLE, phases=(TOP,)), source(tiny, splits, 0, phases=(TOP,))
    assert all(same(one_epoch(data, TOP, epoch), one_epoch(afresh, TOP, epoch)) for epoch in range(2))
    assert same(validation(data, TOP), validation(afresh, TOP))
    assert not data.prefixes["top"].values
    monkeypatch.setattr("cxr.training.batch_source.grey_batches", None)
    assert same(one_epoch(data, TOP, 2), one_epoch(afresh, TOP, 2))
    assert same(validation(data, TOP), validation(afresh, TOP))


def test_a_row_computed_alone_has_the_bits_that_it_has_among_others() -> None:
    """A damaged row is computed again alone. The real network: narrow ones do not show the difference."""
    network = resnet18(weights=None, num_classes=2).eval().to(memory_format=torch.channels_last)
    prefix = Prefix(network, HEAD, PassSettings(BATCH, 0, "fp32", torch.device("cpu")))
    images = torch.rand(5, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    together = prefix._run(images)
    for row in range(5):
        assert torch.equal(prefix._run(images[row : row + 1]), together[row : row + 1])
