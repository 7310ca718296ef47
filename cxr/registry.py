"""The best model as an MLflow LoggedModel: safetensors, a card and the code; no pickle."""

from __future__ import annotations

import base64
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

import cxr
from cxr.model import StateDict
from cxr.predictor import ModelCard, save_package

REQUIREMENTS = (
    "mlflow",
    "numpy",
    "pandas",
    "pillow",
    "safetensors",
    "scikit-learn",
    "torch",
    "torchvision",
    "tqdm",
)


def requirements() -> list[str]:
    """What a logged model needs, pinned to what is installed: MLflow's inference of it takes seconds and a network."""
    return [f"{name}=={version(name).split('+')[0]}" for name in REQUIREMENTS]


def log_model(state: StateDict, card: ModelCard, example: bytes) -> str:
    """Log the model into the active run and return its id. `example` is an encoded image."""
    import mlflow

    source = Path(cxr.__file__).parent
    with tempfile.TemporaryDirectory() as work:
        package = Path(work) / "package"
        save_package(package, state, card)
        info = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(source / "pyfunc_model.py"),
            artifacts={"package": str(package)},
            code_paths=[str(source)],
            pip_requirements=requirements(),
            signature=_signature(),
            input_example=pd.DataFrame({"image": [base64.b64encode(example).decode()]}),
            metadata={"class_to_index": card.class_to_index, "strategy": card.strategy, "arch": card.arch},
        )
    return str(info.model_id)


def _signature() -> Any:
    """`image` is of any type, because bytes, base64 text and arrays are all taken."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema
    from mlflow.types.schema import AnyType

    anything = AnyType()  # type: ignore[no-untyped-call]
    inputs = Schema([ColSpec(anything, "image")])
    outputs = Schema([ColSpec("string", "label"), ColSpec("double", "probability"), ColSpec("long", "decision")])
    return ModelSignature(inputs=inputs, outputs=outputs)
