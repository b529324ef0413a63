"""`coe-dist export mlflow`: a run as an MLflow model that anybody can load or serve.

DIR/MLmodel, requirements.txt, ...   MLflow's description: signature, input example, requirements
DIR/model.py                         coe_dist/exports/mlflow_script.py
DIR/code/coe_dist_<digest>/          the modules of this package that answering needs
DIR/prepare.py                       coe_dist/preparation.py: image files -> the body of a request
DIR/artifacts/weights/               what `coe-dist export weights` writes: safetensors and config.json

mlflow.pyfunc.load_model("DIR").predict(images_NCHW)     # uint8, a table of answers
mlflow models serve -m DIR --env-manager local           # POST {"inputs": images} to /invocations
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coe_dist import preparation
from coe_dist.errors import InputError
from coe_dist.exports.packaged_code import package_code, rename_imports, requirements, write_code
from coe_dist.inference import PretrainedConfig, read_config
from coe_dist.tracking.runs import run_id_of
from coe_dist.tracking.store import connect, redact, settle_mlflow, uri_of_run
from coe_dist.training.chosen import LATEST, Weights
from coe_dist.training.export import export_weights
from coe_dist.training.new_folder import check_new, new_folder
from coe_dist.training.run_folder import load_run_config

MODEL_NAME = "collaboration"  # of the model inside its MLflow run
_UPLOAD_SECONDS = "60"  # for one answer of a server that takes weights; tracking's own limit is for a few numbers
_SCRIPT = Path(__file__).with_name("mlflow_script.py")


@dataclass
class Exported:
    """Where a model was written to: folders and MLflow's addresses; and what the user should know."""

    places: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def export_mlflow(
    run_dir: Path,
    *,
    out: Path | None = None,
    register: str | None = None,
    weights: Weights | None = None,
    checkpoint: str = LATEST,
) -> Exported:
    """Logs the model in the run's own MLflow run where tracking is on, and saves it in the new folder `out` if given.

    register: also a new version of the registered model of that name. weights, checkpoint: see export_weights. `out`
    appears whole or not at all. Raises InputError as export_weights does, where there is neither `out` nor an MLflow
    run, and where MLflow does not take the model although it must (`register`, or no `out`); with an `out` that is a
    warning.
    """
    config = load_run_config(run_dir)
    run_id = run_id_of(run_dir) if config.tracking.enabled else None
    reason = "the run has no MLflow run" if config.tracking.enabled else "the run has tracking.enabled: false"
    if register is not None and not re.fullmatch(r"[^/:\s](?:[^/:\n]{0,200}[^/:\s])?", register):
        raise InputError(f"--register: {register!r} is not allowed; give a name without '/' and ':'")
    if register is not None and run_id is None:
        raise InputError(f"--register: {register} is not allowed; {reason}, so there is no registry to use")
    if out is None and run_id is None:
        raise InputError(f"--out: missing; {reason}, so give the folder to save the model in")
    if out is not None:
        check_new(out)
    exported = Exported()
    if config.tracking.enabled and run_id is None:
        exported.warnings.append(f"{run_dir}: {reason}; the model is saved in {out} only")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        exported.warnings += export_weights(run_dir, folder / "weights", weights, checkpoint)
        if run_id is not None:
            uri = uri_of_run(run_dir, config)
            try:
                exported.places.append(_log(folder, uri, run_id, register))
            except Exception as error:  # whatever MLflow raises for a store it cannot use
                message = f"tracking.uri: {redact(uri)} did not take the model: {_line(error)}"
                if out is None or register is not None:
                    raise InputError(message) from error
                exported.warnings.append(message)
        if out is not None:
            model = _save(folder, "saved")
            with new_folder(out) as partial:
                shutil.copytree(model, partial, dirs_exist_ok=True)
            exported.places.append(str(out))
    return exported


def _save(folder: Path, name: str, **identity: str) -> Path:
    """Makes the model <folder>/<name> of <folder>/weights; `identity` becomes part of its MLmodel."""
    model = folder / name
    settle_mlflow()
    import mlflow

    code = package_code("coe_dist.inference")
    script = folder / "model.py"
    script.write_text(rename_imports(_SCRIPT.read_text(), code.name))
    weights = read_config(folder / "weights")
    mlflow.pyfunc.save_model(
        path=str(model),
        python_model=str(script),
        code_paths=[str(write_code(code, folder / "code"))],
        artifacts={"weights": str(folder / "weights")},
        pip_requirements=requirements(code.libraries | {"mlflow", "numpy", "torch"}),
        signature=_signature(weights),
        input_example=_example(weights),
        metadata={"preparation": weights.preparation.model_dump()},
        mlflow_model=mlflow.models.Model(**identity),
    )
    shutil.copyfile(preparation.__file__, model / "prepare.py")
    for cache in list(model.rglob("__pycache__")):
        shutil.rmtree(cache)
    return model


def _signature(weights: PretrainedConfig) -> Any:
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema, TensorSpec

    shape = (-1, weights.channels, weights.resolution, weights.resolution)
    columns = {"class": "string", "probability": "double", "expert": "long", "macs": "long"}
    return ModelSignature(
        inputs=Schema([TensorSpec(np.dtype("uint8"), shape)]),
        outputs=Schema([ColSpec(kind, name) for name, kind in columns.items()]),
    )


def _example(weights: PretrainedConfig) -> Any:
    """One image, [1,C,H,W]: a slope from dark to light."""
    import numpy as np

    row = np.linspace(0, 255, weights.resolution).astype(np.uint8)
    return np.broadcast_to(row, (1, weights.channels, weights.resolution, weights.resolution)).copy()


def _log(folder: Path, uri: str, run_id: str, register: str | None) -> str:
    """Uploads the model; returns its address. Through MLflow's client alone: its fluent functions would reopen the run
    and change the whole process's tracking address."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", _UPLOAD_SECONDS)
    client = connect(uri)
    from mlflow.entities import LoggedModelOutput
    from mlflow.exceptions import MlflowException

    config = read_config(folder / "weights")
    logged = client.create_logged_model(
        client.get_run(run_id).info.experiment_id,
        name=MODEL_NAME,
        source_run_id=run_id,
        params={"step": str(config.step), "epoch": str(config.epoch), "weights": config.weights},
    )
    try:
        client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=config.step)])
        client.log_model_artifacts(
            logged.model_id, str(_save(folder, "logged", run_id=run_id, model_id=logged.model_id))
        )
    except BaseException:
        client.finalize_logged_model(logged.model_id, "FAILED")
        raise
    client.finalize_logged_model(logged.model_id, "READY")
    if register is None:
        return f"models:/{logged.model_id}"
    try:
        client.create_registered_model(register)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    # not "models:/<id>": the registry would look that up in the whole process's tracking address
    version = client.create_model_version(
        register, source=logged.artifact_location, run_id=run_id, model_id=logged.model_id
    )
    link = [{"name": register, "version": version.version}]
    client.set_logged_model_tags(logged.model_id, {"mlflow.modelVersions": json.dumps(link)})
    return f"models:/{register}/{version.version}"


def _line(error: BaseException) -> str:
    return redact(" ".join(f"{type(error).__name__}: {error}".split()))[:300]
