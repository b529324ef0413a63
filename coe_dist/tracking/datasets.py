"""The data of a run as MLflow's own kind of record (`mlflow.log_input`): its page then shows what a run was made of."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coe_dist.config import RunConfig, is_url
from coe_dist.tracking.store import connect, cut, redact, uri_of_run

DIGEST_LIMIT, NAME_LIMIT = 36, 500  # characters; MLflow refuses more
_log = logging.getLogger("coe_dist.tracking")


@dataclass(frozen=True)
class DataUsed:
    """One split. context: training, validation or test; digest: names its content; place: path or URL; profile: figures
    about it."""

    name: str
    context: str
    digest: str
    place: str
    profile: Mapping[str, Any]


def log_datasets(config: RunConfig, run_id: str | None, datasets: Iterable[DataUsed]) -> None:
    """Records the splits with the run; the same ones a second time change nothing. Never raises."""
    if run_id is None or not config.tracking.enabled:
        return
    try:
        client = connect(uri_of_run(config.run_dir, config))
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = [
            DatasetInput(
                Dataset(
                    name=cut(data.name, NAME_LIMIT),
                    digest=data.digest[:DIGEST_LIMIT],
                    source_type="local",
                    source=json.dumps({"uri": data.place if is_url(data.place) else str(Path(data.place).absolute())}),
                    profile=json.dumps(dict(data.profile)),
                ),
                [InputTag("mlflow.data.context", data.context)],
            )
            for data in datasets
        ]
        if inputs:
            client.log_inputs(run_id, datasets=inputs)
    except Exception as error:
        _log.warning("MLflow did not take the data of run %s: %s", run_id, redact(" ".join(str(error).split()))[:300])
