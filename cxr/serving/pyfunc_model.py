"""The code of the logged model ("models from code"): MLflow runs this file when it loads one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.pyfunc.model import PythonModel, PythonModelContext
from torch import nn

from cxr.config import ServeConfig
from cxr.data.decode import ImageError, UInt8
from cxr.serving.predictor import Predictor
from cxr.serving.request import Limits, RequestError, decoded

_SERVED = "_MLFLOW_IS_IN_SERVING_ENVIRONMENT"  # MLflow's server sets it to "true"


class XrayModel(PythonModel):
    """Images in (column `image`), label, probability and decision out."""

    def load_context(self, context: PythonModelContext) -> None:
        """Read the package that was logged as the artifact `package`."""
        self.predictor = Predictor.load(Path(context.artifacts["package"]))

    def network(self) -> nn.Module:
        """The torchvision module (or the ensemble of several) with its weights, in eval mode; its input is made by
        `predictor.prepare`.
        """
        return self.predictor.model

    # No type hint on `model_input`: MLflow would take it for a schema.
    def predict(self, context: PythonModelContext, model_input, params: dict[str, Any] | None = None) -> pd.DataFrame:  # type: ignore[no-untyped-def]
        """A DataFrame with one column of images; see `Predictor.prepare`. MLflow makes one of a list."""
        if len(model_input) == 0:
            raise MlflowException.invalid_parameter_value("no image was given")
        images = model_input.iloc[:, 0]
        if os.environ.get(_SERVED) == "true":
            _check_request(list(images))
        return self.predictor.predict([self._prepare(row, image) for row, image in enumerate(images)])

    def _prepare(self, row: int, image: object) -> UInt8:
        """As MLflow's own error, which its server answers with 400 and the message."""
        try:
            return self.predictor.prepare(image)
        except ImageError as error:
            raise MlflowException.invalid_parameter_value(f"image {row}: {error}") from error


def _check_request(images: list[object]) -> None:
    """The limits of `cxr models serve` for a request to MLflow's server, which has already read and parsed it."""
    limits = Limits.of(ServeConfig())
    try:
        limits.check_number(len(images))
        limits.check_pixels([decoded(row, image) for row, image in enumerate(images) if isinstance(image, str)])
    except RequestError as error:
        raise MlflowException.invalid_parameter_value(str(error)) from error


mlflow.models.set_model(XrayModel())
