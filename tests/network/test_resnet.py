from __future__ import annotations

import copy
import pickle
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from narrow import narrow_resnet
from payload import Payload
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision import models
from torchvision.models import ResNet

from cxr.config import ARCHS
from cxr.errors import UserError
from cxr.families import FAMILIES, RESNET
from cxr.network.freezing import apply_phase, bit_sums, checksum, count_parameters, stage_state
from cxr.network.inference import autocast, folded
from cxr.network.resnet import build_model
from cxr.network.stages import run_stages, stage_modules
from cxr.network.weights import WeightsKind, fit_weights
from cxr.strategies import ALL, HEAD, STAGES, TOP, Phase

StateDict = dict[str, Tensor]


@pytest.fixture(scope="module")
def published() -> StateDict:
    """A state dict as published: float16 convolutions and a head of 1000 classes."""
    torch.manual_seed(7)
    state = models.resnet18(num_classes=1000).state_dict()
    return {key: value.half() if value.ndim == 4 else value for key, value in state.items()}


def refuses(path: Path | str, *words: str) -> None:
    with pytest.raises(UserError) as error:
        build_model("resnet18", str(path), 0)
    message = str(error.value)
    assert "\n" not in message
    for word in ("--weights", *words):
        assert word in message


@pytest.mark.parametrize("arch", [arch for arch in ARCHS if FAMILIES[arch] is RESNET])
def test_every_architecture_consists_of_the_six_stages(arch: str) -> None:
    with torch.device("meta"):
        model, used = build_model(arch, "random", 0)
    assert (used.kind, str(used)) == (WeightsKind.RANDOM, "random")
    assert model.fc.out_features == 2
    assert [key for stage in STAGES for key in stage_state(model, [stage])] == list(model.state_dict())
    assert count_parameters(model) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_the_stages_one_after_another_are_the_network(arch: str) -> None:
    model, _ = build_model(arch, "random", 0)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(run_stages(model.eval(), x, STAGES), model(x))
        for phase in (HEAD, TOP):
            halves = run_stages(model, run_stages(model, x, phase.frozen), phase.trainable)
            assert torch.equal(halves, model(x))


def test_resnet18_parameters_are_counted_by_stage() -> None:
    model, _ = build_model("resnet18", "random", 0)
    assert count_parameters(model, ["stem"]) == 3 * 64 * 49 + 2 * 64
    assert count_parameters(model, ["fc"]) == 2 * 512 + 2
    assert count_parameters(model) == 11_177_538


def test_the_seed_determines_the_model_and_the_head_independent_of_earlier_draws(
    published: StateDict, tmp_path: Path
) -> None:
    torch.save(published, tmp_path / "published.pth")
    first, _ = build_model("resnet18", "random", 1)
    torch.rand(10)
    again, _ = build_model("resnet18", "random", 1)
    other, _ = build_model("resnet18", "random", 2)
    loaded, _ = build_model("resnet18", str(tmp_path / "published.pth"), 1)
    assert checksum(first) == checksum(again) != checksum(other)
    assert checksum(first, ["fc"]) == checksum(loaded, ["fc"])
    assert checksum(first, ["fc"]) != checksum(other, ["fc"])


def save_nested(state: StateDict, path: Path) -> None:
    torch.save({"epoch": 3, "state_dict": state}, path)


@pytest.mark.parametrize(
    ("name", "save"),
    [("w.pth", torch.save), ("w.pt", save_nested), ("w.safetensors", save_file), ("no-suffix", torch.save)],
)
def test_published_weights_load_from_any_format(
    published: StateDict, tmp_path: Path, name: str, save: Callable[..., object]
) -> None:
    save(published, tmp_path / name)
    model, used = build_model("resnet18", str(tmp_path / name), 0)
    assert re.fullmatch(rf"{name} \(sha256 [0-9a-f]{{12}}\)", str(used))
    assert not used.random
    for key, value in stage_state(model, STAGES[:-1]).items():
        assert torch.equal(value, published[key].to(value.dtype))
        assert value.dtype != torch.float16
    assert model.fc.weight.shape == (2, 512)


def test_a_head_of_two_classes_is_loaded(tmp_path: Path) -> None:
    source, _ = build_model("resnet18", "random", 5)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    model, _ = build_model("resnet18", str(tmp_path / "w.pth"), 6)
    assert checksum(model) == checksum(source)


def test_counters_of_batches_may_be_missing(tiny: ResNet) -> None:
    state = {k: v for k, v in tiny.state_dict().items() if not k.endswith("num_batches_tracked")}
    other = narrow_resnet(1)
    fit_weights(other, state, "here")
    assert checksum(other) == checksum(tiny)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    refuses(tmp_path / "absent.pth", str(tmp_path / "absent.pth"), "no such file", "auto, imagenet, random")
    refuses(tmp_path, "no such file")


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize("keep", [0, 3, 500, 20_000])
def test_a_truncated_file_is_rejected(tiny: ResNet, tmp_path: Path, name: str, keep: int) -> None:
    path = tmp_path / name
    state = tiny.to(memory_format=torch.contiguous_format).state_dict()
    (save_file if path.suffix == ".safetensors" else torch.save)(state, path)
    path.write_bytes(path.read_bytes()[:keep])
    refuses(path, str(path))


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_weights_file_is_rejected_and_does_not_run(tmp_path: Path, legacy: bool) -> None:
    mark, path = tmp_path / "mark", tmp_path / "evil.pth"
    if legacy:
        path.write_bytes(pickle.dumps({"conv1.weight": Payload(mark)}, protocol=2))
        pickle.loads(path.read_bytes())
    else:
        torch.save({"conv1.weight": Payload(mark)}, path)
        torch.load(path, weights_only=False)
    assert mark.exists()  # the payload does run where it is let
    mark.unlink()
    refuses(path, "refused")
    assert not mark.exists()


@pytest.mark.parametrize("content", [[1, 2], {}, {"a": 1}, {3: torch.zeros(1)}, {"state_dict": "none"}, torch.zeros(3)])
def test_an_invalid_state_dict_is_rejected(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "w.pth")
    refuses(tmp_path / "w.pth", "not a state dict")


def test_weights_of_another_architecture_are_rejected_with_the_mismatches(tmp_path: Path) -> None:
    torch.save(models.resnet34().state_dict(), tmp_path / "34.pth")
    refuses(tmp_path / "34.pth", "does not fit --arch", "unknown: layer1.2.conv1.weight", "more")
    state = {**models.resnet18(num_classes=3).state_dict(), "extra": torch.zeros(1)}
    with pytest.raises(UserError, match=r"missing: layer1\.2.*; unknown: extra; of another shape: fc\.weight"):
        fit_weights(models.resnet34(num_classes=2), state, "here")


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_rejected(tiny: ResNet, number: float) -> None:
    state = copy.deepcopy(tiny.state_dict())
    state["layer2.0.conv1.weight"][0, 0, 0, 0] = number
    with pytest.raises(UserError, match=r"not finite: layer2\.0\.conv1\.weight$"):
        fit_weights(tiny, state, "here")


def test_rejected_weights_do_not_change_the_model(tiny: ResNet) -> None:
    before = checksum(tiny)
    with pytest.raises(UserError):
        fit_weights(tiny, models.resnet18(num_classes=1000).state_dict(), "here")
    assert checksum(tiny) == before


def no_network(*_: object, **__: object) -> StateDict:
    raise OSError("Network is unreachable")


def broken_cache(*_: object, **__: object) -> StateDict:
    raise pickle.UnpicklingError("invalid load key")


@pytest.mark.parametrize("failure", [no_network, broken_cache])
def test_offline_auto_uses_random_weights_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, failure: Callable[..., StateDict]
) -> None:
    monkeypatch.setattr(models.ResNet18_Weights, "get_state_dict", failure)
    with pytest.warns(UserWarning, match="RANDOM weights"):
        model, used = build_model("resnet18", "auto", 3)
    assert used.random
    assert str(used) == "random (ImageNet weights could not be downloaded)"
    assert checksum(model) == checksum(build_model("resnet18", "random", 3)[0])


def test_offline_imagenet_fails_with_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.ResNet18_Weights, "get_state_dict", no_network)
    refuses("imagenet", "Network is unreachable", "--weights PATH", "--weights random")


def test_downloaded_weights_are_used_without_running_code_and_with_a_timeout(
    monkeypatch: pytest.MonkeyPatch, published: StateDict
) -> None:
    def download(*_: object, **options: Any) -> StateDict:
        assert options["check_hash"]
        assert options["weights_only"]
        assert socket.getdefaulttimeout()
        return published

    before = socket.getdefaulttimeout()
    monkeypatch.setattr(models.ResNet18_Weights, "get_state_dict", download)
    model, used = build_model("resnet18", "auto", 0)
    assert str(used) == "imagenet (ResNet18_Weights.IMAGENET1K_V1)"
    assert torch.equal(model.conv1.weight, published["conv1.weight"].float())
    assert socket.getdefaulttimeout() == before


@pytest.mark.parametrize("phase", [HEAD, TOP, ALL])
def test_applying_a_phase_freezes_the_prefix_and_readies_the_suffix(tiny: ResNet, phase: Phase) -> None:
    parameters = apply_phase(tiny, ALL)
    parameters = apply_phase(tiny, phase)
    assert sum(p.numel() for p in parameters) == count_parameters(tiny, phase.trainable)
    for stage in STAGES:
        trains = stage in phase.trainable
        for module in (inner for outer in stage_modules(tiny, stage) for inner in outer.modules()):
            assert module.training is trains
            assert all(p.requires_grad is trains for p in module.parameters())


@pytest.mark.parametrize("phase", [HEAD, TOP, ALL])
def test_a_training_step_changes_only_the_trainable_stages(tiny: ResNet, phase: Phase) -> None:
    optimizer = torch.optim.SGD(apply_phase(tiny, phase), 0.1)
    before = {stage: checksum(tiny, [stage]) for stage in STAGES}
    nn.functional.cross_entropy(tiny(torch.randn(4, 3, 32, 32)), torch.tensor([0, 1, 0, 1])).backward()
    optimizer.step()
    assert [stage for stage in STAGES if checksum(tiny, [stage]) != before[stage]] == list(phase.trainable)
    assert all(p.grad is None for s in phase.frozen for m in stage_modules(tiny, s) for p in m.parameters())


def test_the_checksum_notices_any_change_and_only_in_its_stages(tiny: ResNet) -> None:
    with torch.no_grad():
        for key in ["conv1.weight", "bn1.running_mean", "layer3.0.bn1.num_batches_tracked", "layer4.0.bn2.running_var"]:
            before = {stage: checksum(tiny, [stage]) for stage in STAGES}
            value = tiny.state_dict()[key]
            value[(0,) * value.ndim] += 1
            changed = [stage for stage in STAGES if checksum(tiny, [stage]) != before[stage]]
            assert changed == [stage for stage in STAGES if key in stage_state(tiny, [stage])]
            assert len(changed) == 1


def test_the_checksum_does_not_depend_on_the_memory_format(tiny: ResNet) -> None:
    before = checksum(tiny)
    assert checksum(tiny.to(memory_format=torch.channels_last)) == before


def test_autocast_is_off_in_fp32() -> None:
    a = torch.ones(2, 2)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        with autocast(torch.device("cpu"), precision):
            assert (a @ a).dtype == dtype


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_folding_removes_batchnorm_only_from_the_stages_and_changes_only_rounding(arch: str) -> None:
    model, _ = build_model(arch, "random", 0)
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -1, 1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    before, copy = checksum(model), folded(model, ("stem", "layer1"))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = run_stages(model.eval(), x, ("stem", "layer1", "layer2"))
        torch.testing.assert_close(run_stages(copy, x, ("stem", "layer1", "layer2")), expected, rtol=1e-4, atol=1e-4)
    kinds = {name.split(".")[0] for name, m in copy.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert kinds == {"layer2", "layer3", "layer4"}
    assert checksum(model) == before


@pytest.mark.parametrize("stage", STAGES)
def test_bit_sums_detect_the_smallest_change(tiny: ResNet, stage: str) -> None:
    before = bit_sums(tiny, STAGES)
    assert before == bit_sums(tiny, STAGES)
    tensor = next(iter(stage_state(tiny, (stage,)).values()))
    with torch.no_grad():
        first = tensor[(0,) * tensor.dim()]
        first.copy_(torch.nextafter(first, torch.tensor(9.0)))
    assert sum(x != y for x, y in zip(before, bit_sums(tiny, STAGES), strict=True)) == 1
    assert bit_sums(tiny, ()) == []
