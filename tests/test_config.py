"""Parameters: rejected values, error messages, and the round trip through the logged text."""

import math
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr.config import (
    ARCHS,
    TrainConfig,
    TuneConfig,
    flatten,
    own_parameters,
    result_parameters,
    unflatten,
    without_password,
)
from cxr.errors import UserError
from cxr.families import FAMILIES
from cxr.parameters import default_of, spec_of, types_of
from cxr.strategies import STRATEGIES

NUMBERS = [item for item in fields(TrainConfig) if types_of(TrainConfig)[item.name] in (int, float)]


def values(name: str) -> st.SearchStrategy[Any]:
    """Any valid value of a numeric parameter."""
    spec = spec_of(next(item for item in NUMBERS if item.name == name))
    low = spec.low if spec.low is not None else spec.above
    assert low is not None
    if types_of(TrainConfig)[name] is int:
        return st.integers(int(low), None if spec.high is None else int(spec.high))
    return st.floats(low, spec.high, exclude_min=spec.above is not None, allow_nan=False, allow_infinity=False)


def config_that_fits(arch: str, image_size: int, **parameters: Any) -> TrainConfig:
    """With the next image size that the backbone takes."""
    return TrainConfig(arch=arch, image_size=image_size + -image_size % FAMILIES[arch].multiple, **parameters)


configs = st.builds(
    config_that_fits,
    strategy=st.sampled_from(list(STRATEGIES)),
    arch=st.sampled_from(ARCHS),
    data_dir=st.text(min_size=1),
    resize=st.sampled_from(["squash", "crop", "pad"]),
    **{item.name: values(item.name) for item in NUMBERS},
)


@settings(max_examples=50)
@given(configs)
def test_flatten_and_unflatten_round_trip(config: TrainConfig) -> None:
    assert unflatten(flatten(config)) == config


def test_flatten_writes_dotted_keys_and_one_spelling_of_a_number() -> None:
    flat = flatten(TrainConfig(lr_head=0.001))
    assert flat["train.lr_head"] == flatten(TrainConfig(lr_head=1e-3))["train.lr_head"] == "0.001"
    assert {key.split(".")[1] for key in flat} == {item.name for item in fields(TrainConfig)}


def test_unflatten_ignores_other_prefixes_and_unknown_parameters() -> None:
    old = {"train.epochs": "3", "class_weight.NORMAL": "2", "train.of_old": "1"}
    assert unflatten(flatten(TrainConfig()) | old) == TrainConfig(epochs=3)


def test_runs_from_before_a_parameter_existed_have_the_value_that_they_were_made_with() -> None:
    old = unflatten({"train.epochs": "3"})
    assert (old.augment, old.average, old.stresses) == ("mild-1", "none", "stresses-1")
    assert not {"train.augment", "train.average", "train.stresses"} & result_parameters(old).keys()
    assert result_parameters(replace(old, average="sma")).keys() - result_parameters(old).keys() == {"train.average"}


def test_ways_to_compile_that_give_the_same_bits_belong_to_one_study() -> None:
    studies = [result_parameters(TrainConfig(compile=how)) for how in ("none", "auto", "graphs", "inductor")]
    assert studies[0] == studies[1] == studies[2] != studies[3]


@pytest.mark.parametrize("item", NUMBERS, ids=lambda item: item.name)
def test_every_number_has_a_lower_bound_and_the_error_names_the_option(item: Any) -> None:
    spec = spec_of(item)
    bound = spec.low if spec.low is not None else spec.above
    assert bound is not None
    with pytest.raises(UserError, match=rf"--{item.name.replace('_', '-')} .*must be"):
        TrainConfig(**{item.name: type(default_of(item))(bound - 1)})


def test_above_is_an_exclusive_bound_and_low_an_inclusive_one() -> None:
    with pytest.raises(UserError, match=r"--val-fraction 0.0: must be above 0"):
        TrainConfig(val_fraction=0.0)
    assert TrainConfig(weight_decay=0.0, views=0, val_fraction=0.5).views == 0


def test_a_value_above_its_upper_bound_is_rejected() -> None:
    with pytest.raises(UserError, match=r"--val-fraction 0.6: must be at most 0.5"):
        TrainConfig(val_fraction=0.6)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_rejected(value: float) -> None:
    with pytest.raises(UserError, match=r"--lr-head .*not a finite number"):
        TrainConfig(lr_head=value)


@pytest.mark.parametrize("seed", [2**64, 10**400])
def test_a_seed_out_of_range_is_rejected(seed: int) -> None:
    with pytest.raises(UserError, match=r"--seed .*must be at most"):
        TrainConfig(seed=seed)


@pytest.mark.parametrize(("name", "value"), [("strategy", "best"), ("arch", "vgg16"), ("on_bad_image", "")])
def test_an_unknown_choice_is_rejected_with_the_choices(name: str, value: str) -> None:
    choices = next(spec_of(item).choices for item in fields(TrainConfig) if item.name == name)
    wrong: dict[str, Any] = {name: value}
    with pytest.raises(UserError, match=f"unknown; choose one of {', '.join(choices)}"):
        TrainConfig(**wrong)


def test_every_search_range_contains_its_default_and_lies_within_the_bounds() -> None:
    ranges = {item.name: item for item in fields(TrainConfig) if spec_of(item).search}
    assert {"lr_head", "lr_top", "lr_all"} <= ranges.keys()
    for name, item in ranges.items():
        ends: tuple[Any, Any] = spec_of(item).search or (0, 0)
        assert ends[0] <= default_of(item) < ends[1]
        assert TrainConfig(**{name: ends[0]}) != TrainConfig(**{name: ends[1]})


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_rates_are_those_of_the_phases_in_order(strategy: str) -> None:
    config = TrainConfig(strategy=strategy, lr_head=0.1, lr_top=0.2, lr_all=0.3)
    rates = {"head": 0.1, "top": 0.2, "all": 0.3}
    assert config.rates() == tuple(rates[phase.name] for phase in config.phases)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://me:secret@host/db", "postgresql://me:***@host/db"),
        ("https://me:secret@host:5000", "https://me:***@host:5000"),
        ("postgresql://me@host:5432/db", "postgresql://me@host:5432/db"),
        ("sqlite:///optuna.db", "sqlite:///optuna.db"),
    ],
)
def test_a_password_is_not_shown(url: str, shown: str) -> None:
    assert without_password(url) == shown
    assert own_parameters(TuneConfig(storage=url))["tune.storage"] == shown
