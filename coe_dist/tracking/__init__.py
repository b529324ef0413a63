"""Records of a run: metrics.jsonl in the run folder first, MLflow second; neither can stop a training.

    journal.py   metrics.jsonl, the primary record
    per_image.py images-<split>.npz, what an evaluation found of every image
    store.py     where MLflow is, its rules for names and values, its web page
    sending.py   carries metrics.jsonl to MLflow from the last sent position on
    runs.py      MLflow runs: create, reopen, finish, artifacts, late synchronisation
    datasets.py  the data of a run, as MLflow records data
    recorder.py  what rank 0 holds during training

MLflow takes seconds to import: no module here imports it before the first call that needs it.
"""

from coe_dist.tracking.datasets import log_datasets
from coe_dist.tracking.journal import METRICS_FILE, TrainedSeconds, read_metrics
from coe_dist.tracking.recorder import Recorder
from coe_dist.tracking.runs import Status, finish_run, log_artifacts, run_id_of, start_run, sync
from coe_dist.tracking.store import tracking_uri, ui_command

__all__ = [
    "METRICS_FILE",
    "Recorder",
    "Status",
    "TrainedSeconds",
    "finish_run",
    "log_artifacts",
    "log_datasets",
    "read_metrics",
    "run_id_of",
    "start_run",
    "sync",
    "tracking_uri",
    "ui_command",
]
