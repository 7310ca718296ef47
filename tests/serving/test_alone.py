"""A logged model is used where training code and its packages cannot be imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow.entities import Run

    from cxr.config import TrainConfig
    from cxr.runs.result import RunResult

PROGRAM = """
import sys

class Refuse:
    names = {names}

    def find_spec(self, name, path=None, target=None):
        if name in self.names or any(name.startswith(f"{{each}}.") for each in self.names):
            raise ImportError(f"{{name}} must not be needed")

sys.meta_path.insert(0, Refuse())
import mlflow

mlflow.set_tracking_uri("{store}")
model = mlflow.pyfunc.load_model("{uri}")
print(model.predict([open("{film}", "rb").read()])["probability"][0])
assert "cxr.serving.predictor" in sys.modules
assert not set({names}) & sys.modules.keys()
"""
FORBIDDEN = (
    "cxr.training",
    "cxr.runs",
    "cxr.studies",
    "cxr.figures",
    "cxr.audit",
    "matplotlib",
    "optuna",
)


def test_a_logged_model_answers_without_training_code_or_figures(
    finished: tuple[TrainConfig, RunResult, Run], store: str, phantoms: Path, tmp_path: Path
) -> None:
    _, result, run = finished
    film = phantoms / str(result.test.table.iloc[0]["path"])
    uri = f"models:/{run.outputs.model_outputs[0].model_id}"
    program = PROGRAM.format(names=FORBIDDEN, store=store, uri=uri, film=film)
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    expected = float(result.test.table.iloc[0]["probability"])
    assert abs(float(done.stdout.strip().splitlines()[-1]) - expected) < 1e-4
