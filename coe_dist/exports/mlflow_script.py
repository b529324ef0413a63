"""The file that MLflow loads an exported model from ("models from code"): nothing is unpickled.

It travels as model.py beside the weights; its import of coe_dist then names the copy that travels with it. Only MLflow
imports it.

    predict(images_NCHW uint8) -> a table with one row for each image, in their order:
        class        name of the most probable class
        probability  of that class
        expert       number of the expert that answered; -1: the delegator did, early
        macs         multiply-adds spent on the image
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import mlflow
import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import torch
from mlflow.exceptions import MlflowException
from mlflow.models import utils as casts_of_tables
from mlflow.pyfunc import PythonModel
from mlflow.types import TensorSpec
from mlflow.utils import proto_json_utils as casts_of_json

LIMIT_VARIABLE = "COE_DIST_IMAGES_PER_CALL"
IMAGES_PER_CALL = 1024  # more are refused, unless the environment variable says otherwise
IMAGES_AT_ONCE = 128  # bounds the memory of a call; the answer to an image does not depend on its batch


class CollaborationModel(PythonModel):  # type: ignore[misc]
    def load_context(self, context: Any) -> None:
        from coe_dist.inference import CollaborationOfExperts

        _refuse_silent_casts()
        self._limit = int(os.environ.get(LIMIT_VARIABLE, IMAGES_PER_CALL))
        self._model = CollaborationOfExperts.from_pretrained(context.artifacts["weights"])

    # MLflow takes no signature from these hints and is content with them: the stored one stays
    def predict(self, context: Any, model_input: np.ndarray, params: Any = None) -> pd.DataFrame:  # type: ignore[type-arg]
        """Raises MlflowException, which servers answer with status 400, for images that cannot be answered."""
        if len(model_input) > self._limit:
            raise _refused(f"{len(model_input)} in one call are not allowed; give at most {self._limit}")
        try:
            parts = [
                self._model(torch.from_numpy(np.ascontiguousarray(model_input[start : start + IMAGES_AT_ONCE])))
                for start in range(0, max(1, len(model_input)), IMAGES_AT_ONCE)
            ]
        except (ValueError, TypeError) as error:  # bad images, said by the model or by torch
            raise MlflowException.invalid_parameter_value(str(error)) from error
        probabilities_NC, expert_N, macs_N = (torch.cat(column) for column in zip(*parts, strict=True))
        probability_N, class_N = probabilities_NC.double().max(dim=1)
        return pd.DataFrame(
            {
                "class": pd.Series([self._model.classes[number] for number in class_N.tolist()], dtype=object),
                "probability": probability_N.numpy(),
                "expert": expert_N.numpy(),
                "macs": macs_N.numpy(),
            }
        )


def _refused(reason: str) -> MlflowException:
    return MlflowException.invalid_parameter_value(f"images: {reason}")


def _refuse_silent_casts() -> None:
    """MLflow casts JSON and tables to the signature's uint8 before the model sees them, with numpy's rules: images from
    0.0 to 1.0 become black, "7" becomes 7, and the answers would be wrong without a word.

    Its two casting functions have no hook, so they are wrapped; another type's casts stay as they are. In a version of
    MLflow without them (outside the model's requirements) the model does not load.
    """
    for module, name in (
        (casts_of_json, "convert_data_type"),
        (casts_of_tables, "_reshape_and_cast_pandas_column_values"),
    ):
        cast = getattr(module, name)
        if not hasattr(cast, "checks_pixels"):
            setattr(module, name, _checked(cast))


def _checked(cast: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(cast)
    def checked(*arguments: Any) -> Any:
        *_, values, spec = arguments
        if isinstance(spec, TensorSpec) and spec.type == np.uint8:
            _check_pixels(values.tolist() if isinstance(values, pd.Series) else values)
        return cast(*arguments)

    checked.checks_pixels = True  # type: ignore[attr-defined]
    return checked


def _check_pixels(values: Any) -> None:
    try:
        array = np.asarray(values)
    except ValueError:
        raise _refused("rows of different lengths are not allowed; give [N, channels, height, width]") from None
    if array.size == 0:
        return  # its shape is refused later, by name
    if array.dtype.kind not in "iu":
        kinds = {"f": "fractions are", "b": "true and false are", "U": "text is"}
        kind = kinds.get(array.dtype.kind, "other values are")
        raise _refused(f"{kind} not allowed; give whole numbers from 0 to 255")
    if array.min() < 0 or array.max() > 255:
        worst = array.max() if array.max() > 255 else array.min()
        raise _refused(f"{worst} is not allowed; give whole numbers from 0 to 255")


mlflow.models.set_model(CollaborationModel())
