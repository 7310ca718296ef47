from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from narrow import narrow_resnet

from cxr.network.ensemble import Ensemble, combined
from cxr.network.inference import infer


@settings(max_examples=50)
@given(st.integers(1, 5), st.integers(1, 8), st.integers(0, 10**6), st.floats(0.1, 50))
def test_combined_logits_are_those_of_the_mean_probabilities(
    members: int, images: int, seed: int, scale: float
) -> None:
    logits = torch.randn(members, images, 2, generator=torch.Generator().manual_seed(seed)) * scale
    expected = logits.double().softmax(-1).mean(0)
    found = combined(logits)
    torch.testing.assert_close(found.double().softmax(-1), expected, atol=1e-5, rtol=1e-4)
    assert torch.isfinite(found).all()


def test_an_ensemble_of_one_network_answers_as_the_network() -> None:
    network, images = narrow_resnet().eval(), torch.randn(4, 3, 32, 32)
    batches = [(images, torch.zeros(4, dtype=torch.int64))]
    alone, whole = infer(network, batches)[0], infer(Ensemble([network]), batches)[0]
    torch.testing.assert_close(whole.softmax(1), alone.softmax(1))
