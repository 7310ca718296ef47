from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from narrow import narrow_resnet

from cxr.network.freezing import stage_state
from cxr.training.averaging import WeightAverage

TRAINED = ("layer4", "fc")


@settings(max_examples=10)
@given(st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=6))
def test_the_average_is_the_mean_over_the_steps_and_leaves_other_stages_as_they_were(shifts: list[float]) -> None:
    model = narrow_resnet()
    average, start = WeightAverage(model, TRAINED), {k: v.clone() for k, v in model.state_dict().items()}
    for shift in shifts:
        with torch.no_grad():
            for name, value in model.state_dict().items():
                if value.is_floating_point():
                    value.copy_(start[name] + shift)
        average.update()
    mean, own = sum(shifts) / len(shifts), average.model.state_dict()
    trained = stage_state(model, TRAINED).keys()
    for name, value in start.items():
        if name in trained and value.is_floating_point():
            torch.testing.assert_close(own[name], value + mean, atol=1e-5, rtol=0)
        else:
            assert torch.equal(own[name], value)


def test_after_one_step_the_average_is_the_network_bit_for_bit() -> None:
    model = narrow_resnet()
    average = WeightAverage(model, TRAINED)
    average.update()
    assert all(torch.equal(average.model.state_dict()[name], value) for name, value in model.state_dict().items())


def test_a_loaded_average_continues_bit_for_bit() -> None:
    model, steps = narrow_resnet(), 4
    whole, broken = WeightAverage(model, TRAINED), WeightAverage(model, TRAINED)
    for step in range(steps):
        with torch.no_grad():
            model.fc.weight.add_(0.1)
        if step == 2:
            resumed = WeightAverage(model, TRAINED)
            resumed.load(broken.state())
            broken = resumed
        whole.update()
        broken.update()
    assert (broken.steps, whole.steps) == (steps, steps)
    pairs = zip(broken.model.state_dict().values(), whole.model.state_dict().values(), strict=True)
    assert all(torch.equal(left, right) for left, right in pairs)
