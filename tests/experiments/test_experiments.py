"""Scripts of `experiments/`, run as commands."""

from __future__ import annotations

import ast
import os
import re
import runpy
import subprocess
import sys
import tempfile
from collections import Counter
from itertools import product
from pathlib import Path
from random import Random

import mlflow
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from PIL import Image
from small import quiet, small

from cxr.config import CompareConfig
from cxr.data.decode import decode_gray
from cxr.data.phantoms import phantom
from cxr.studies.compare import compare_tracked

ROOT = Path(__file__).parents[2]
# What a machine with a GPU may not have, and the benchmark must do without.
BARE = """
import pathlib, runpy, sys
sys.modules.update(dict.fromkeys(["mlflow", "optuna", "lightning", "timm"]))
sys.argv = sys.argv[1:]
sys.path.insert(0, str(pathlib.Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_every_script_says_how_it_is_run_and_where_its_result_is() -> None:
    headings = re.findall(r"^## (.+)$", (ROOT / "experiments" / "LOG.md").read_text(), re.MULTILINE)
    scripts = [path for path in (ROOT / "experiments").glob("*.py") if "__main__" in path.read_text()]
    assert len(scripts) > 7
    for script in scripts:
        text = " ".join((ast.get_docstring(ast.parse(script.read_text())) or "").split())
        assert f"python experiments/{script.name} " in text
        named = re.findall(r'"(\d{4}-\d{2}-\d{2}: [^"]+)"', text)
        assert named or "docs/reliability.md" in text, f"{script.name} names no entry of LOG.md"
        assert set(named) <= set(headings), script.name


@pytest.mark.slow
def test_the_training_benchmark_times_both_ways_on_copies(phantoms: Path, tmp_path: Path) -> None:
    out, files = tmp_path / "table.csv", len(list(phantoms.glob("tr*/*/*"))) + len(list(phantoms.glob("val/*/*")))
    options = f"--data-dir {phantoms} --strategies frozen --epochs 2 --copies 2 --image-size 64 --workers 0 --out {out}"
    script = str(ROOT / "experiments" / "bench_train.py")
    command = [sys.executable, "-c", BARE, script, *options.split(), "--device", "cpu"]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # as the tests beside it
    done = subprocess.run(command, cwd=ROOT, env=one_thread, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    train, val = (int(done.stdout.split(f"{split} ")[1].split()[0].strip(",")) for split in ("train", "val"))
    assert train + val == 2 * files
    table = pd.read_csv(out).set_index("way")
    assert list(table.index) == ["ceiling", "notebook", "cxr"]
    assert (table.loc[["notebook", "cxr"]].drop(columns="strategy") > 0).all(axis=None)
    assert (table.loc["notebook", ["epoch ratio", "run ratio"]] == 1).all()
    assert table.loc["ceiling", "of ceiling"] == 1


def test_the_dicom_check_writes_files_that_show_the_same_image() -> None:
    script = runpy.run_path(str(ROOT / "experiments" / "dicom_check.py"), run_name="checked")
    pixels = phantom(np.random.default_rng(0), "normal", 64)
    ways = product(*(script[name] for name in ("PHOTOMETRIC", "BITS", "LOOKS", "SYNTAXES")))
    gaps = {
        way: int(
            np.abs(
                decode_gray(script["dicom_of"](Image.fromarray(pixels), *way), 64, "pad")[0] - pixels.astype(int)
            ).max()
        )
        for way in ways
    }
    assert len(gaps) == 72
    assert {way: gap for way, gap in gaps.items() if gap > 1} == {}


@pytest.mark.slow
def test_a_comparison_is_judged_from_what_its_runs_logged(
    phantoms: Path, in_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    from judge_comparison import main

    options = {"strategies": "frozen", "seeds": 2, "ensemble": True, "register": "none", "cache_dir": str(tmp_path)}
    compare_tracked(small(CompareConfig, phantoms, **options), say=quiet)
    kind = "tags.`cxr.kind` = 'comparison'"
    (parent,) = mlflow.search_runs(search_all_experiments=True, output_format="list", filter_string=kind, max_results=1)
    done = CliRunner().invoke(main, [parent.info.run_id], catch_exceptions=False)
    assert done.exit_code == 0
    assert "selected by the lowest mean val_loss: frozen" in done.output
    assert done.output.count(" ensemble ") == 1
    assert all(name in done.output for name in ("Doerrich", "champion by val_loss", "Spearman", "worst_stress"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["JPEG", "PNG", "DICOM", "list", "weights", "card", "parameter", "request"])
def test_a_small_share_of_the_fuzzing_finds_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    import fuzz

    for cached in (fuzz.scratch, fuzz.package, fuzz.server):
        cached.cache_clear()
    target = fuzz.TARGETS[name]
    outcomes = Counter(fuzz.outcome(target, target.make(Random(f"suite-{number}"))) for number in range(40))
    assert set(outcomes) <= {"result", "refused"}
    assert outcomes["refused"] > 5
