"""The network as it was before training."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torchvision.models import resnet18

from cxr.network.inference import infer, infer_with_features
from cxr.network.stages import run_stages
from cxr.network.start import StartNetwork
from cxr.strategies import STAGES, STRATEGIES

BODY = STAGES[:-1]


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(3, 3, 32, 32, generator=generator), torch.zeros(3, dtype=torch.int64)) for _ in range(2)]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_its_features_are_those_of_the_weights_before_training(strategy: str) -> None:
    torch.manual_seed(0)
    network = resnet18(num_classes=2).eval()
    before, phases = deepcopy(network), STRATEGIES[strategy]
    start = StartNetwork.of(network, phases)
    with torch.no_grad():
        for phase in phases:
            for name, value in network.state_dict().items():
                if value.is_floating_point() and name.split(".")[0] in phase.trainable:
                    value += 0.1
    features, logits = infer_with_features(network, start, batches())
    with torch.no_grad():
        pooled = torch.cat([before.avgpool(run_stages(before, x, BODY)).flatten(1) for x, _ in batches()])
    torch.testing.assert_close(features, torch.nn.functional.normalize(pooled), atol=2e-3, rtol=2e-2)
    torch.testing.assert_close(logits, infer(network, batches())[0])
    assert start.shared == tuple(stage for stage in BODY if all(stage in phase.frozen for phase in phases))


def test_what_it_keeps_makes_it_again_bit_for_bit() -> None:
    network = resnet18(num_classes=2).eval()
    start = StartNetwork.of(network, STRATEGIES["partial"])
    kept = start.state()
    assert all(name.startswith("layer4.") for name in kept)
    torch.nn.init.zeros_(network.layer4[0].conv1.weight)
    again = StartNetwork(network, kept)
    first, second = (infer_with_features(network, each, batches())[0] for each in (start, again))
    assert torch.equal(first, second)


def test_a_frozen_network_keeps_nothing() -> None:
    assert StartNetwork.of(resnet18(num_classes=2), STRATEGIES["frozen"]).state() == {}
