"""Several processes train one model: on the CPU, by gloo."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from command import run_main
from torch import nn
from torch.multiprocessing.spawn import spawn

from cxr.data.batches import epoch_order
from cxr.training import distributed as parallel

ROOT = Path(__file__).parents[2]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())


def images() -> torch.Tensor:
    return torch.randn(7, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def one_step(net: nn.Sequential, shown: torch.Tensor) -> dict[str, torch.Tensor]:
    """State and gradients after a forward and a backward pass; the loss is a sum over the images."""
    net.train()
    wrapped = parallel.data_parallel(net)  # held: the gradients are averaged as long as it lives
    wrapped(shown).pow(2).sum().backward()
    found = {name: value.detach().clone() for name, value in net.state_dict().items()}
    return found | {f"grad.{name}": p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def half_a_step(rank: int, meeting: str, out: str) -> None:
    """One of two processes: its share of the images, and what all have in common."""
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    net = network()
    parallel.share_batchnorm(net, [net], torch.device("cpu"))
    (mine,) = parallel.shares([torch.arange(7)])
    found = one_step(net, images()[mine])
    found["rank 0's"] = parallel.broadcast(torch.tensor([float(rank)]))
    found["sum"] = parallel.summed(torch.tensor([1.0 + rank]))
    found["agreed"] = torch.tensor(parallel.agreed([rank]))
    found["images"] = mine
    torch.save(found, f"{out}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_take_the_step_that_one_takes(tmp_path: Path) -> None:
    spawn(half_a_step, (str(tmp_path / "meeting"), str(tmp_path)), nprocs=2)
    both = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    expected = one_step(network(), images())
    assert sorted(torch.cat([each["images"] for each in both]).tolist()) == list(range(7))
    for each in both:
        for name, value in expected.items():
            scale = 2 if name.startswith("grad.") else 1  # they are averaged over the two
            torch.testing.assert_close(each[name] * scale, value, rtol=1e-5, atol=5e-4, msg=name)
        assert (each["rank 0's"], each["sum"], each["agreed"]) == (0, 3, 0)


def test_alone_nothing_is_shared_out_or_wrapped() -> None:
    order, net = epoch_order(10, 4, 0, 0), network()
    assert parallel.shares(order) is order
    assert parallel.data_parallel(net) is net
    parallel.share_batchnorm(net, [net], torch.device("cpu"))
    assert type(net[1]) is nn.BatchNorm2d
    with parallel.joined("cpu"):
        assert (parallel.rank(), parallel.size()) == (0, 1)


def test_a_batchnorm_is_shared_where_it_is_itself_a_part_that_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `norm5` of DenseNet is; what is frozen stays as it is."""
    monkeypatch.setattr(parallel, "size", lambda: 2)
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(nn.BatchNorm2d(3)), nn.BatchNorm2d(3))
    state = net.state_dict()
    parallel.share_batchnorm(net, [net[1], net[2]], torch.device("cpu"))
    kinds = [type(norm) for norm in (net[0], net[1][0], net[2])]
    assert kinds == [nn.BatchNorm2d, parallel.SharedBatchNorm, parallel.SharedBatchNorm]
    assert net.state_dict().keys() == state.keys()


def cxr(processes: int, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command line in so many processes of one thread each, by torchrun."""
    launcher = ["torch.distributed.run", "--nproc-per-node", str(processes), "-m"]
    command = [sys.executable, "-m", *launcher, "cxr", *arguments]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=variables, check=False)


def losses(output: str) -> list[tuple[float, float]]:
    """(training, validation) of each epoch."""
    return [(float(a), float(b)) for a, b in re.findall(r"loss (\S+) / val (\S+)", output)]


@pytest.mark.slow
def test_torchrun_trains_what_one_process_trains(
    in_store: str, phantoms: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        *("train", "--strategy", "gradual", "--data-dir", str(phantoms), "--weights", "random", "--image-size", "64"),
        *("--epochs", "1", "--views", "1", "--bootstrap", "0", "--batch-size", "8", "--device", "cpu"),
    ]
    assert run_main(monkeypatch, *arguments) == 0
    two = cxr(2, *arguments)
    assert two.returncode == 0, two.stderr
    left, right = losses(capsys.readouterr().out), losses(two.stdout)
    assert len(left) == len(right) == 3
    assert right[0] == pytest.approx(left[0], abs=2e-4)  # the head alone: only the order of sums differs
    # Adam makes whole steps of gradients that are only rounding, so that weights drift apart from then on.
    assert [train for train, _ in right] == pytest.approx([train for train, _ in left], rel=0.05)
    assert two.stdout.count("registered as") == 1


@pytest.mark.slow
def test_under_torchrun_bad_input_is_said_once_and_a_search_refused(tmp_path: Path) -> None:
    for arguments, words in (
        (["train", "--data-dir", str(tmp_path / "nowhere")], "nowhere"),
        (["tune", "--trials", "1"], "torchrun: not supported by tune"),
    ):
        done = cxr(2, *arguments, MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path / 'mlflow.db'}")
        assert done.returncode != 0
        said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(said) == 1, done.stderr
        assert words in said[0]
        assert "process 1:" not in done.stderr
