"""Options and project text derived from the configuration."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import click
from click.testing import CliRunner

from cxr.config import TrainConfig
from cxr.project import options


def parse(*arguments: str) -> TrainConfig:
    """What a command with the derived options makes of its arguments."""
    seen: list[TrainConfig] = []

    @click.command()
    @options(TrainConfig)
    def command(**parameters: Any) -> None:
        seen.append(TrainConfig(**parameters))

    result = CliRunner().invoke(command, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return seen[0]


def test_no_arguments_give_the_defaults() -> None:
    assert parse() == TrainConfig()


def test_hyphens_and_underscores_mean_the_same() -> None:
    expected = replace(TrainConfig(), batch_size=8, lr_top=2e-4)
    assert parse("--batch-size", "8", "--lr-top", "2e-4") == expected
    assert parse("--batch_size", "8", "--lr_top", "0.0002") == expected
