from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from narrow import narrow_resnet
from sklearn.metrics import roc_auc_score
from some import some
from torch import Tensor
from torchvision.models import ResNet

from cxr.data.batches import Split, eval_batches
from cxr.errors import FreezeError, UserError
from cxr.network.freezing import apply_phase, checksum, stage_state
from cxr.network.inference import infer
from cxr.network.stages import run_stages
from cxr.network.weights import StateDict
from cxr.strategies import HEAD, STAGES, STRATEGIES, TOP, Phase
from cxr.training import faster
from cxr.training import loop as train_module
from cxr.training.batch_source import BatchSource, SourceSettings
from cxr.training.checkpoint import LAST, Checkpoints
from cxr.training.faster import Step
from cxr.training.loop import EpochRecord, Schedule, class_weights, fit

Splits = tuple[Split, Split]
Batch = tuple[Tensor, Tensor]
TrainData = Callable[[Phase, int], Iterable[Batch]]
ValData = Callable[[Phase], Iterable[Batch]]
GRADUAL = STRATEGIES["gradual"]
RATES = {"head": 1e-2, "top": 3e-3, "all": 1e-3}
SCHEDULE = Schedule(GRADUAL, tuple(RATES.values()), 2, 0.0, step_size=1, gamma=0.5, patience=5, precision="fp32")


@pytest.fixture(scope="module")
def few(splits: Splits) -> Splits:
    """Eleven training and ten validation images of both classes."""
    return some(splits[0], 11), some(splits[1], 10)


def start(
    model: ResNet,
    data: Splits,
    folder: Path,
    phases: tuple[Phase, ...] = GRADUAL,
    *,
    budget: float = 1e9,
    rates: dict[str, float] = RATES,
    wrap_train: Callable[[TrainData], TrainData] = lambda source: source,
    wrap_val: Callable[[ValData], ValData] = lambda source: source,
    **changes: Any,
) -> Iterator[EpochRecord]:
    """`fit` as the pipeline calls it, in batches of four and with two views."""
    schedule = replace(SCHEDULE, phases=phases, rates=tuple(rates[phase.name] for phase in phases), **changes)
    source = BatchSource(model, *data, SourceSettings(4, 0, 2, schedule.precision, budget, phases))
    source.train = wrap_train(source.train)  # type: ignore[method-assign]
    source.val = wrap_val(source.val)  # type: ignore[method-assign]
    with Checkpoints(folder) as checkpoints:
        yield from fit(model, schedule, class_weights(data[0].labels), source, checkpoints)


def clone(state: StateDict) -> StateDict:
    return {key: value.clone() for key, value in state.items()}


def equal(left: StateDict, right: StateDict) -> bool:
    return left.keys() == right.keys() and all(torch.equal(value, right[key]) for key, value in left.items())


def without_timings(records: list[EpochRecord]) -> list[dict[str, Any]]:
    timings = ("epoch_seconds", "eval_seconds", "images_per_second")
    metrics = [{k: v for k, v in record.metrics.items() if k not in timings} for record in records]
    return [
        {"epoch": r.epoch, "phase": r.phase, "index": r.phase_index, "improved": r.improved, "proof": r.proof, **m}
        for r, m in zip(records, metrics, strict=True)
    ]


class Spy:
    """Notes the network's state at the start of each phase and whenever it is validated."""

    def __init__(self, model: ResNet):
        self.model, self.entered, self.validated = model, dict[str, StateDict](), list[StateDict]()

    def wrap_train(self, source: TrainData) -> TrainData:
        def spied(phase: Phase, epoch: int) -> Iterable[Batch]:
            self.entered.setdefault(phase.name, clone(self.model.state_dict()))
            return source(phase, epoch)

        return spied

    def wrap_val(self, source: ValData) -> ValData:
        def spied(phase: Phase) -> Iterable[Batch]:
            self.validated.append(clone(self.model.state_dict()))
            return source(phase)

        return spied


@pytest.mark.parametrize("budget", [0, 1e9])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_prefix_stays_bit_for_bit_and_every_stage_of_the_suffix_moves(
    tiny: ResNet, few: Splits, tmp_path: Path, strategy: str, budget: float
) -> None:
    spy = Spy(tiny)
    records = list(
        start(
            tiny,
            few,
            tmp_path,
            STRATEGIES[strategy],
            budget=budget,
            wrap_train=spy.wrap_train,
            wrap_val=spy.wrap_val,
        )
    )
    assert len(spy.validated) == len(records) == 2 * len(STRATEGIES[strategy])
    for record, after in zip(records, spy.validated, strict=True):
        phase, before = STRATEGIES[strategy][record.phase_index], spy.entered[record.phase]
        assert equal(pick(tiny, phase.frozen, before), pick(tiny, phase.frozen, after))
        for stage in phase.trainable:
            old, new = pick(tiny, [stage], before), pick(tiny, [stage], after)
            assert not any(torch.equal(old[key], new[key]) for key in old)  # BatchNorm's buffers too


def pick(model: ResNet, stages: Iterable[str], state: StateDict) -> StateDict:
    return {key: state[key] for key in stage_state(model, stages)}


def test_the_last_epoch_of_a_phase_proves_the_freezing(tiny: ResNet, few: Splits, tmp_path: Path) -> None:
    records = list(start(tiny, few, tmp_path))
    assert [record.proof is not None for record in records] == [False, True] * 3
    for proof, phase in zip([r.proof for r in records if r.proof], GRADUAL, strict=True):
        assert (proof.phase, proof.stages, proof.before) == (phase.name, phase.frozen, proof.after)


def test_batchnorm_left_in_train_mode_is_found_out(
    tiny: ResNet, few: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def careless(model: ResNet, phase: Phase) -> list[torch.nn.Parameter]:
        parameters = apply_phase(model, phase)
        model.train()  # what others do: no gradients, but BatchNorm keeps updating
        model(torch.ones(2, 3, 32, 32))
        return parameters

    monkeypatch.setattr(train_module, "apply_phase", careless)
    with pytest.raises(FreezeError, match=r"phase top: .*stem, layer1, layer2, layer3"):
        list(start(tiny, few, tmp_path, (TOP,), budget=0))


@pytest.mark.parametrize("key", ["conv1.weight", "layer3.0.bn2.running_var", "layer2.0.bn1.num_batches_tracked"])
def test_a_frozen_number_that_moves_ends_the_run_in_that_epoch(
    tiny: ResNet, few: Splits, tmp_path: Path, key: str
) -> None:
    def perturb(source: TrainData) -> TrainData:
        def perturbed(phase: Phase, epoch: int) -> Iterable[Batch]:
            with torch.no_grad():
                if epoch == 1:
                    value = tiny.state_dict()[key]
                    value[(0,) * value.ndim] += 1
            return source(phase, epoch)

        return perturbed

    records = start(tiny, few, tmp_path, (TOP,), wrap_train=perturb, epochs=5)
    next(records)
    saved = (tmp_path / LAST).read_bytes()
    with pytest.raises(FreezeError, match="invalid"):
        next(records)
    assert (tmp_path / LAST).read_bytes() == saved  # nothing of the invalid state was saved


@pytest.fixture(scope="module")
def trained(few: Splits, tmp_path_factory: pytest.TempPathFactory) -> tuple[Spy, list[EpochRecord]]:
    """`gradual` at rates that overshoot, so that the last epoch is not the best."""
    spy, rates = Spy(narrow_resnet()), {"head": 1e-2, "top": 0.3, "all": 0.3}
    folder = tmp_path_factory.mktemp("run")
    run = start(spy.model, few, folder, rates=rates, wrap_train=spy.wrap_train, wrap_val=spy.wrap_val)
    return spy, list(run)


def test_epochs_count_on_across_phases(trained: tuple[Spy, list[EpochRecord]]) -> None:
    _, records = trained
    assert [record.epoch for record in records] == list(range(6))
    assert [record.phase for record in records] == ["head"] * 2 + ["top"] * 2 + ["all"] * 2
    assert [record.phase_index for record in records] == [0, 0, 1, 1, 2, 2]


def test_each_phase_starts_from_the_best_so_far(trained: tuple[Spy, list[EpochRecord]]) -> None:
    spy, records = trained
    losses = [record.metrics["val_loss"] for record in records]
    for phase, seen in (("top", 2), ("all", 4)):
        assert equal(spy.entered[phase], spy.validated[int(np.argmin(losses[:seen]))])
    assert np.argmin(losses[:4]) != 3  # else the last would do as well


def test_the_best_checkpoint_is_what_remains(trained: tuple[Spy, list[EpochRecord]], few: Splits) -> None:
    spy, records = trained
    losses = [record.metrics["val_loss"] for record in records]
    best = int(np.argmin(losses))
    assert best != len(records) - 1
    assert equal(clone(spy.model.state_dict()), spy.validated[best])
    assert [r.improved for r in records] == [loss < min([np.inf, *losses[:i]]) for i, loss in enumerate(losses)]
    logits, labels = infer(spy.model, eval_batches(few[1], 4, torch.device("cpu")))
    again = F.cross_entropy(logits, labels, class_weights(few[0].labels)).item()
    assert again == pytest.approx(losses[best], rel=1e-5)
    assert not spy.model.training


def test_validation_figures_are_those_of_scikit_learn(tiny: ResNet, few: Splits, tmp_path: Path) -> None:
    (record,) = start(tiny, few, tmp_path, (TOP,), epochs=1)
    logits, labels = infer(tiny, eval_batches(few[1], 4, torch.device("cpu")))
    assert record.metrics["val_roc_auc"] == roc_auc_score(labels, logits[:, 1] - logits[:, 0])
    assert record.metrics["val_accuracy"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())


@pytest.mark.parametrize(("step_size", "factors"), [(1, [1, 0.1, 0.01, 0.001]), (2, [1, 1, 0.1, 0.1])])
def test_the_learning_rate_falls_in_steps_and_anew_in_each_phase(
    tiny: ResNet, few: Splits, tmp_path: Path, step_size: int, factors: list[float]
) -> None:
    run = start(tiny, few, tmp_path, (HEAD, TOP), epochs=4, gamma=0.1, step_size=step_size, patience=9)
    rates = [record.metrics["lr"] for record in run]
    assert rates == pytest.approx([RATES["head"] * f for f in factors] + [RATES["top"] * f for f in factors])


def test_a_rate_lowered_to_nothing_moves_nothing(tiny: ResNet, few: Splits, tmp_path: Path) -> None:
    spy = Spy(tiny)
    list(start(tiny, few, tmp_path, (HEAD,), gamma=1e-12, epochs=3, patience=9, wrap_val=spy.wrap_val))
    first, *later = [state["fc.weight"] for state in spy.validated]
    assert all(torch.allclose(weight, first, rtol=0, atol=1e-8) for weight in later)


@pytest.mark.parametrize("patience", [1, 2, 3])
def test_a_phase_ends_after_so_many_epochs_without_a_better_loss(
    tiny: ResNet, few: Splits, tmp_path: Path, patience: int
) -> None:
    def worsen(_: ValData) -> ValData:
        size = itertools.count(1)

        def ever_surer_of_the_wrong_class(phase: Phase) -> Iterable[Batch]:
            towards_one = (tiny.fc.weight[1] - tiny.fc.weight[0]).detach() * next(size) * 100
            features = torch.stack([towards_one, -towards_one]).view(2, -1, 1, 1)
            return [(features, torch.tensor([0, 1]))]

        return ever_surer_of_the_wrong_class

    run = start(tiny, few, tmp_path, (HEAD,), rates={"head": 1e-9}, wrap_val=worsen, epochs=9, patience=patience)
    records = list(run)
    assert [record.improved for record in records] == [True] + [False] * patience
    assert records[-1].proof


@given(st.integers(1, 50), st.integers(1, 50))
@settings(max_examples=30)
def test_class_weights_are_balanced(normal: int, pneumonia: int) -> None:
    labels = np.array([0] * normal + [1] * pneumonia)
    total = normal + pneumonia
    assert class_weights(labels).tolist() == pytest.approx([total / (2 * normal), total / (2 * pneumonia)])
    assert class_weights(labels)[labels].mean().item() == pytest.approx(1, rel=1e-5)


def test_the_losses_are_weighted_means_over_all_images(tiny: ResNet, few: Splits, tmp_path: Path) -> None:
    initial = copy.deepcopy(tiny).eval()
    (record,) = start(tiny, few, tmp_path, (HEAD,), rates={"head": 1e-12}, epochs=1)
    source = BatchSource(initial, *few, SourceSettings(4, 0, 2, "fp32", 0, (HEAD,)))
    source.enter(HEAD)
    for name, batches in (("train", source.train(HEAD, 0)), ("val", source.val(HEAD))):
        logits, labels = infer(initial, batches, "fp32", ["fc"])
        expected = F.cross_entropy(logits, labels, class_weights(few[0].labels)).item()
        assert record.metrics[f"{name}_loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("phase", GRADUAL)
def test_divergence_names_the_rate_to_lower(tiny: ResNet, few: Splits, tmp_path: Path, phase: Phase) -> None:
    def magnify(source: TrainData) -> TrainData:
        return lambda phase, epoch: ((features * 1e10, labels) for features, labels in source(phase, epoch))

    option = f"--{phase.lr.replace('_', '-')}"
    run = start(tiny, few, tmp_path, (phase,), rates={phase.name: 1e30}, wrap_train=magnify)
    with pytest.raises(UserError, match=rf"diverged in phase {phase.name}, epoch 0.*lower {option} \(now 1e\+30\)"):
        next(run)
    assert not (tmp_path / LAST).exists()


def test_training_in_bf16_gives_finite_numbers_and_float32_weights(tiny: ResNet, few: Splits, tmp_path: Path) -> None:
    (record,) = start(tiny, few, tmp_path, (TOP,), epochs=1, precision="bf16")
    assert np.isfinite(list(record.metrics.values())).all()
    assert {p.dtype for p in tiny.parameters()} == {torch.float32}


@pytest.fixture(scope="module")
def uninterrupted(few: Splits, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], str]:
    """What `gradual` gives when nothing comes between: records and the checksum of the weights."""
    model = narrow_resnet()
    records = without_timings(list(start(model, few, tmp_path_factory.mktemp("run"))))
    assert len(records) == 6
    return records, checksum(model)


Result = tuple[list[dict[str, Any]], str]


def taken_up(few: Splits, folder: Path, **options: Any) -> Result:
    """The records and weights of a run resumed from `folder`, with an untrained model."""
    model = narrow_resnet(99) if (folder / LAST).exists() else narrow_resnet()
    return without_timings(list(start(model, few, folder, **options))), checksum(model)


@pytest.mark.parametrize("epochs", range(7))
def test_a_run_stopped_after_any_epoch_goes_on_to_the_same_result(
    few: Splits, tmp_path: Path, uninterrupted: Result, epochs: int
) -> None:
    before = list(itertools.islice(start(narrow_resnet(), few, tmp_path), epochs))
    assert without_timings(before) == uninterrupted[0][:epochs]
    assert taken_up(few, tmp_path) == uninterrupted


@pytest.fixture(scope="module")
def averaged(few: Splits, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """What `gradual` gives with averaged weights when nothing comes between."""
    model = narrow_resnet()
    records = without_timings(list(start(model, few, tmp_path_factory.mktemp("run"), average="sma", epochs=3)))
    return records, checksum(model)


def test_the_average_begins_with_the_second_epoch_of_the_last_phase(averaged: Result) -> None:
    counted = [record.get("averaged_steps") for record in averaged[0]]
    assert counted == [*[None] * 6, 0, 3, 6]


def test_until_the_average_begins_nothing_differs(averaged: Result, few: Splits, tmp_path: Path) -> None:
    plain = without_timings(list(start(narrow_resnet(), few, tmp_path, epochs=3)))
    same = [{k: v for k, v in record.items() if k != "averaged_steps"} for record in averaged[0]]
    assert same[:7] == plain[:7]
    trained = [{k: v for k, v in record.items() if k.startswith("train_")} for record in plain]
    assert [{k: v for k, v in record.items() if k.startswith("train_")} for record in same] == trained
    assert same[8]["val_loss"] != plain[8]["val_loss"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_is_validated_and_kept_is_the_mean_of_the_weights_after_each_step(
    few: Splits, tmp_path: Path, strategy: str
) -> None:
    model, phase = narrow_resnet(), STRATEGIES[strategy][-1]
    frozen, steps, last = checksum(model, phase.frozen), list[StateDict](), {"phase": "", "epoch": -1}

    def watch(source: TrainData) -> TrainData:
        def watched(now: Phase, epoch: int) -> Iterable[Batch]:
            begins = last["phase"] == now.name
            last.update(phase=now.name, epoch=epoch)
            for step, batch in enumerate(source(now, epoch)):
                if begins and now == phase and step:
                    steps.append(clone(stage_state(model, phase.trainable)))
                yield batch
            if begins and now == phase:
                steps.append(clone(stage_state(model, phase.trainable)))

        return watched

    records = list(
        start(model, few, tmp_path, STRATEGIES[strategy], average="sma", epochs=2, patience=9, wrap_train=watch)
    )
    assert records[-1].metrics["averaged_steps"] == len(steps) == 3
    logits, labels = infer(model, eval_batches(few[1], 4, torch.device("cpu")))
    if records[-1].improved:
        for name, value in stage_state(model, phase.trainable).items():
            if value.is_floating_point():
                torch.testing.assert_close(value, torch.stack([step[name] for step in steps]).mean(0))
        weights = class_weights(few[0].labels)
        assert records[-1].metrics["val_loss"] == pytest.approx(
            F.cross_entropy(logits, labels, weights).item(), rel=1e-5
        )
    assert checksum(model, phase.frozen) == frozen


@pytest.mark.parametrize("epochs", [7, 8, 9])
def test_a_run_with_averaged_weights_resumes_to_the_same_result(
    few: Splits, tmp_path: Path, averaged: Result, epochs: int
) -> None:
    options: dict[str, Any] = {"average": "sma", "epochs": 3}
    before = list(itertools.islice(start(narrow_resnet(), few, tmp_path, **options), epochs))
    assert without_timings(before) == averaged[0][:epochs]
    assert taken_up(few, tmp_path, **options) == averaged


def test_reuse_of_activations_changes_no_average(few: Splits, tmp_path: Path, averaged: Result) -> None:
    assert taken_up(few, tmp_path, average="sma", epochs=3, budget=0) == averaged


def test_reuse_of_activations_changes_no_result(few: Splits, tmp_path: Path, uninterrupted: Result) -> None:
    assert taken_up(few, tmp_path, budget=0) == uninterrupted


@pytest.mark.parametrize("epoch", [0, 3])
def test_a_run_broken_off_within_an_epoch_repeats_it(
    few: Splits, tmp_path: Path, uninterrupted: Result, epoch: int
) -> None:
    def break_off(source: TrainData) -> TrainData:
        def broken(phase: Phase, now: int) -> Iterable[Batch]:
            for step, batch in enumerate(source(phase, now)):
                if (now, step) == (epoch, 1):
                    raise KeyboardInterrupt
                yield batch

        return broken

    with pytest.raises(KeyboardInterrupt):
        list(start(narrow_resnet(), few, tmp_path, wrap_train=break_off))
    assert taken_up(few, tmp_path) == uninterrupted


@pytest.mark.parametrize("save", [0, 1, 2])
def test_a_crash_between_tensors_and_state_leaves_a_run_that_goes_on(
    few: Splits, tmp_path: Path, uninterrupted: Result, monkeypatch: pytest.MonkeyPatch, save: int
) -> None:
    calls, whole = itertools.count(), Checkpoints.save

    def crash(self: Checkpoints, state: dict[str, Any], keep: set[str]) -> None:
        if next(calls) == save:
            raise KeyboardInterrupt
        whole(self, state, keep)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", crash)
        with pytest.raises(KeyboardInterrupt):
            list(start(narrow_resnet(), few, tmp_path))
    assert taken_up(few, tmp_path) == uninterrupted


@pytest.mark.parametrize("writes", range(3, 14))
def test_whatever_was_written_when_the_process_died_a_run_goes_on_from(
    few: Splits, tmp_path: Path, uninterrupted: Result, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    calls, whole = itertools.count(), Checkpoints._write

    def write(self: Checkpoints, file: Callable[[], object]) -> None:
        if next(calls) < writes:
            whole(self, file)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "_write", write)
        records = start(narrow_resnet(), few, tmp_path)
        with suppress(UserError):  # best tensors that never reached the disk
            for _ in records:
                assert (tmp_path / LAST).exists()
    assert taken_up(few, tmp_path) == uninterrupted


def test_a_record_is_given_when_the_one_before_is_saved_however_slow_the_disk(
    few: Splits, tmp_path: Path, uninterrupted: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Checkpoints._write

    def slowly(self: Checkpoints, file: Callable[[], object]) -> None:
        time.sleep(0.1)
        whole(self, file)

    monkeypatch.setattr(Checkpoints, "_write", slowly)
    records = []
    for record in start(narrow_resnet(), few, tmp_path):
        records.append(record)
        assert torch.load(tmp_path / LAST, weights_only=True)["progress"]["epoch"] in (record.epoch, record.epoch + 1)
    assert without_timings(records) == uninterrupted[0]


def test_a_finished_run_is_told_again_without_training(few: Splits, tmp_path: Path, uninterrupted: Result) -> None:
    def never(source: TrainData) -> TrainData:
        def fail(phase: Phase, epoch: int) -> Iterable[Batch]:
            raise AssertionError("trained again")

        return fail

    list(start(narrow_resnet(), few, tmp_path))
    assert taken_up(few, tmp_path, wrap_train=never) == uninterrupted


def test_the_checkpoint_folder_holds_only_what_the_state_names(
    tiny: ResNet, few: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = list[Checkpoints]()
    monkeypatch.setattr(Checkpoints, "__enter__", lambda self: (checkpoints.append(self), self)[1])
    for _ in start(tiny, few, tmp_path):
        checkpoints[0].flush()
        progress = torch.load(tmp_path / LAST, weights_only=True)["progress"]
        named = {LAST, progress["base"], *progress["best_files"]}
        assert {path.name for path in tmp_path.iterdir()} == named


def test_inference_gives_every_image_in_order_and_leaves_eval_mode(tiny: ResNet, few: Splits) -> None:
    logits, labels = infer(tiny.train(), eval_batches(few[1], 4, torch.device("cpu")))
    assert labels.tolist() == few[1].labels.tolist()
    assert (logits.dtype, logits.shape) == (torch.float32, (len(few[1]), 2))
    assert not logits.is_inference()
    assert not any(module.training for module in tiny.modules())
    ((whole, _),) = eval_batches(few[1], 100, torch.device("cpu"))
    with torch.no_grad():
        torch.testing.assert_close(logits, run_stages(tiny, whole, STAGES))


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_a_resumed_phase_goes_on_with_its_rate(few: Splits, tmp_path: Path, epochs: int) -> None:
    def head(model: ResNet) -> Iterator[EpochRecord]:
        return start(model, few, tmp_path, (HEAD,), epochs=5, step_size=2, patience=9)

    list(itertools.islice(head(narrow_resnet()), epochs))
    rates = [record.metrics["lr"] / RATES["head"] for record in head(narrow_resnet())]
    assert rates == [1, 1, 0.5, 0.5, 0.25]


@pytest.mark.slow
def test_compiled_steps_take_the_same_way(few: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, used = torch.compile, []
    monkeypatch.setattr("torch._inductor.config.compile_threads", 1)  # more are processes that import torch first

    def counted(module: torch.nn.Module, **options: Any) -> Callable[[Tensor], Tensor]:
        made = compiled(module, **options)
        return lambda features: (used.append(len(features)), made(features))[1]

    monkeypatch.setattr(torch, "compile", counted)
    ways = []
    for how in ("none", "inductor"):
        rates = {"head": 1e-3, "top": 1e-4}
        ways.append(list(start(narrow_resnet(), few, tmp_path / how, (HEAD, TOP), compile=how, rates=rates)))
    for plain, fast in zip(*ways, strict=True):
        for name in ("train_loss", "val_loss"):
            assert fast.metrics[name] == pytest.approx(plain.metrics[name], rel=1e-2)
    assert used == [4] * 2 * len(ways[0])  # eleven images in fours: the last three go as they are


def test_recorded_steps_take_the_same_way(few: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[float] = []

    def record(step: Step, inputs: tuple[Tensor, Tensor]) -> Callable[[], None]:
        recorded.append(step.optimizer.param_groups[0]["lr"])
        return lambda: step(*inputs)  # as a graph, which knows the memory of its inputs only

    monkeypatch.setattr(faster, "record", record)
    ways = []
    for how in ("none", "graphs"):
        model, rates = narrow_resnet(), {"head": 1e-3, "top": 1e-4}
        options: dict[str, Any] = {"compile": how, "rates": rates, "epochs": 5, "step_size": 2, "patience": 9}
        records = list(start(model, few, tmp_path / how, (HEAD, TOP), **options))
        ways.append((without_timings(records), clone(model.state_dict())))
    (plain, weights), (fast, same) = ways
    assert plain == fast
    assert equal(weights, same)
    # Eleven images in fours are two whole batches an epoch; the fourth of a phase is the first that is recorded.
    assert recorded == pytest.approx([1e-3, 5e-4, 25e-5, 1e-4, 5e-5, 25e-6])


def test_an_optimizer_is_marked_as_recordable_only_while_it_is_recorded(tiny: ResNet) -> None:
    optimizer = torch.optim.Adam(tiny.parameters(), fused=True)
    with suppress(ValueError), faster._capturable(optimizer):
        assert optimizer.param_groups[0]["capturable"]
        raise ValueError
    assert optimizer.param_groups[0]["capturable"] is False
