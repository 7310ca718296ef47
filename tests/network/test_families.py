"""What holds for the networks of every family: stages, freezing, folding, weights, Grad-CAM."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from narrow import ARCH, OTHERS
from planted import planted
from torch import Tensor, nn
from torchvision import models

from cxr.config import ARCHS, TrainConfig
from cxr.errors import UserError
from cxr.families import FAMILIES, Family
from cxr.network.freezing import apply_phase, checksum, count_parameters, stage_state
from cxr.network.gradcam import heatmaps
from cxr.network.inference import folded, infer, infer_with_features
from cxr.network.resnet import build_model, create
from cxr.network.stages import (
    classifier_of,
    family_of,
    join_maps,
    pool,
    run_stages,
    split_maps,
    stage_parts,
    stages_of,
)
from cxr.network.start import StartNetwork
from cxr.network.weights import WeightsKind, fit_weights
from cxr.strategies import STRATEGIES
from cxr.training.faster import Suffix

SIZE = 64
NARROW = (ARCH, *OTHERS)
FIRST_OF_FAMILY = {family.kind: arch for arch, family in reversed(FAMILIES.items()) if arch in ARCHS}


@pytest.fixture(params=NARROW)
def network(request: pytest.FixtureRequest) -> nn.Module:
    """A narrow network of each family with BatchNorm statistics and heads as after training, in eval mode."""
    return trained(request.param)


def trained(arch: str) -> nn.Module:
    model, _ = build_model(arch, "random", 0, size=SIZE)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    nn.init.normal_(classifier_of(model).weight)
    return model.to(memory_format=torch.channels_last).eval()


def images(count: int = 4) -> Tensor:
    found = torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    return found.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("arch", ARCHS)
def test_every_backbone_consists_of_its_stages(arch: str) -> None:
    with torch.device("meta"):
        model, used = build_model(arch, "random", 0, classes=3)
    family = FAMILIES[arch]
    assert family_of(model) is family
    assert (used.kind, classifier_of(model).out_features) == (WeightsKind.RANDOM, 3)
    keys = [key for stage in family.stages for key in stage_state(model, [stage])]
    assert sorted(keys) == sorted(model.state_dict())  # each in one stage
    assert count_parameters(model) == sum(p.numel() for p in model.parameters())
    assert all(stage_parts(model, stage) for stage in family.stages)


def test_a_network_of_no_family_is_refused() -> None:
    with pytest.raises(TypeError, match="Linear: not a network of a known family"):
        family_of(nn.Linear(1, 1))


@pytest.mark.parametrize("arch", ARCHS)
def test_a_phase_has_the_same_role_in_every_family(arch: str) -> None:
    head, top, everything = TrainConfig(arch=arch, strategy="gradual").phases
    family = FAMILIES[arch]
    assert head.trainable == (family.stages[-1],)
    assert head.head_only
    assert everything.trainable == family.stages
    assert set(head.trainable) < set(top.trainable) < set(family.stages)


def test_the_stages_one_after_another_are_the_network(network: nn.Module) -> None:
    x = images()
    with torch.no_grad():
        assert torch.equal(run_stages(network, x, stages_of(network)), network(x))


def test_what_a_stage_gives_can_be_kept_channels_last(network: nn.Module) -> None:
    x = images()
    with torch.no_grad():
        for stage in stages_of(network)[:-1]:
            x = run_stages(network, x, [stage])
            assert x.dim() == 4
            assert x.is_contiguous(memory_format=torch.channels_last)


def test_pooling_twice_is_pooling_once(network: nn.Module) -> None:
    with torch.no_grad():
        pooled = pool(network, run_stages(network, images(), stages_of(network)[:-1]))
        assert pooled.shape == (4, classifier_of(network).in_features, 1, 1)
        assert torch.equal(pool(network, pooled), pooled)


def test_maps_and_the_rest_make_the_features_again(network: nn.Module) -> None:
    with torch.no_grad():
        features = run_stages(network, images(), stages_of(network)[:-1])
        maps, rest = split_maps(network, features)
        assert maps.shape[2] == maps.shape[3]
        assert torch.equal(join_maps(network, maps, rest), features)


@pytest.mark.parametrize("role", [0, 1, 2])
def test_a_step_moves_the_trained_stages_and_nothing_else(network: nn.Module, role: int) -> None:
    phase = family_of(network).phases("gradual")[role]
    parameters = apply_phase(network, phase)
    assert sum(p.numel() for p in parameters) == count_parameters(network, phase.trainable)
    assert not any(m.training for stage in phase.frozen for part in stage_parts(network, stage) for m in _modules(part))
    before = {stage: checksum(network, [stage]) for stage in stages_of(network)}
    nn.functional.cross_entropy(network(images()), torch.tensor([0, 1, 0, 1])).backward()
    torch.optim.Adam(parameters, 0.01).step()
    assert [stage for stage in before if checksum(network, [stage]) != before[stage]] == list(phase.trainable)


def _modules(part: nn.Module | nn.Parameter) -> list[nn.Module]:
    return list(part.modules()) if isinstance(part, nn.Module) else []


def test_dropout_and_stochastic_depth_rest_in_what_is_frozen(network: nn.Module) -> None:
    phase = family_of(network).phases("partial")[0]
    apply_phase(network, phase)
    with torch.no_grad():
        first, second = (run_stages(network, images(), phase.frozen) for _ in range(2))
    assert torch.equal(first, second)


def test_folding_changes_only_rounding(network: nn.Module) -> None:
    before, stages = checksum(network), stages_of(network)[:-1]
    copied = folded(network, stages)
    norms = [sum(isinstance(m, nn.BatchNorm2d) for m in each.modules()) for each in (network, copied)]
    with torch.no_grad():
        expected = run_stages(network, images(), stages)
        torch.testing.assert_close(run_stages(copied, images(), stages), expected, rtol=1e-4, atol=1e-4)
    assert checksum(network) == before
    # In DenseNet most come before a convolution.
    assert norms[0] == 0 or norms[1] < norms[0]
    assert norms[1] == 0 or isinstance(network, models.DenseNet)


def test_folding_leaves_the_other_stages_alone(network: nn.Module) -> None:
    stages = stages_of(network)
    copied = folded(network, stages[:2])
    assert checksum(copied, stages[2:]) == checksum(network, stages[2:])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_start_features_are_those_of_the_weights_before_training(network: nn.Module, strategy: str) -> None:
    body, batches = stages_of(network)[:-1], [(images(), torch.zeros(4, dtype=torch.int64))]
    phases = family_of(network).phases(strategy)
    with torch.no_grad():
        expected = pool(network, run_stages(network, images(), body)).flatten(1)
        start = StartNetwork.of(network, phases)
        for value in stage_state(network, phases[-1].trainable).values():
            value += 0.01 if value.is_floating_point() else 0
    features, logits = infer_with_features(network, start, batches)
    torch.testing.assert_close(features, nn.functional.normalize(expected), atol=5e-3, rtol=5e-2)
    torch.testing.assert_close(logits, infer(network, batches)[0])
    again = StartNetwork(network, start.state())
    assert torch.equal(infer_with_features(network, again, batches)[0], features)


def test_grad_cam_gives_maps_of_the_images_size_and_leaves_the_model(network: nn.Module) -> None:
    before, shown = checksum(network), planted(0, 3)[0][:, :SIZE, :SIZE]
    heats = [heatmaps(network, shown, target) for target in (0, 1)]
    assert heats[0].shape == (3, SIZE, SIZE)
    assert min(heat.min() for heat in heats) >= 0
    assert max(heat.max() for heat in heats) == pytest.approx(1)
    assert checksum(network) == before


@pytest.mark.parametrize("role", [0, 1, 2])
def test_a_suffix_compiles_without_a_break(network: nn.Module, role: int) -> None:
    phase = family_of(network).phases("gradual")[role]
    with torch.no_grad():
        features = run_stages(network, images(), phase.frozen)
        compiled = torch.compile(Suffix(network, phase.trainable), backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(features), network(images()))
    torch._dynamo.reset()


@pytest.mark.parametrize("arch", FIRST_OF_FAMILY.values())
def test_published_imagenet_weights_fit(arch: str) -> None:
    """As torchvision publishes them: a head of 1000 classes, and the names that modules had then."""
    old = {"densenet121": (r"\.(norm|relu|conv)([12])\.(weight|bias|run)", r".\1.\2.\3")}
    torch.manual_seed(1)
    state = create(arch, 1000).state_dict()
    pattern, name = old.get(arch, ("", ""))
    if arch == "vit_b_16":
        published = {_linear(key): value for key, value in state.items()}
    else:
        published = {re.sub(pattern, name, key) if pattern else key: value for key, value in state.items()}
    assert (published.keys() != state.keys()) is (arch in ("densenet121", "vit_b_16"))
    model = create(arch)
    fresh = copy.deepcopy(classifier_of(model))
    fit_weights(model, published, "here")
    body = stages_of(model)[:-1]
    assert all(torch.equal(value, state[key]) for key, value in stage_state(model, body).items())
    assert torch.equal(classifier_of(model).weight, fresh.weight)


def _linear(key: str) -> str:
    return key.replace(".mlp.0.", ".mlp.linear_1.").replace(".mlp.3.", ".mlp.linear_2.")


def test_a_vision_transformer_takes_weights_of_another_image_size() -> None:
    source, model = create("narrow_vit", size=64), create("narrow_vit", size=96)
    fit_weights(model, source.state_dict(), "here")
    own, given = model.state_dict()["encoder.pos_embedding"], source.state_dict()["encoder.pos_embedding"]
    assert own.shape == (1, 37, 8)
    assert torch.equal(own[:, 0], given[:, 0])
    with torch.no_grad():
        assert model.eval()(torch.zeros(1, 3, 96, 96)).shape == (1, 2)


@pytest.mark.parametrize("shape", [(1, 16, 8), (17, 8), (1, 17, 4)])
def test_a_position_embedding_that_cannot_fit_is_named(shape: tuple[int, ...]) -> None:
    model = create("narrow_vit", size=96)
    state = {**model.state_dict(), "encoder.pos_embedding": torch.zeros(shape)}
    with pytest.raises(UserError, match=r"of another shape: encoder\.pos_embedding"):
        fit_weights(model, state, "here")


def test_a_vision_transformer_refuses_a_size_that_its_patches_do_not_fill() -> None:
    with pytest.raises(UserError, match="--image-size 100: --arch vit_b_16 takes multiples of 16"):
        TrainConfig(arch="vit_b_16", image_size=100)
    assert TrainConfig(arch="swin_t", image_size=100).image_size == 100


def test_families_name_only_their_own_stages() -> None:
    for family in FAMILIES.values():
        assert isinstance(family, Family)
        assert {family.top, family.cam} <= set(family.stages)
        assert family.classifier.startswith(family.stages[-1])
