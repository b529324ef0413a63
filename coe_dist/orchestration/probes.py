"""Small pieces of real work, one a component: `python -m coe_dist.orchestration.probes NAME` in a folder of its own.

The doctor starts each as a process, because a broken installation may hang or crash instead of raising. The last
line of standard output is JSON with what is worth knowing.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

from coe_dist.leaving import leave

_MEMBERS = 8  # images, steps or rows of a probe


def probe_torch() -> dict[str, Any]:
    """One all-reduce over gloo; tells backends and GPUs."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{os.getcwd()}/meeting", rank=0, world_size=1)
    row = torch.ones(_MEMBERS)
    dist.all_reduce(row)
    assert row.sum().item() == _MEMBERS
    dist.destroy_process_group()
    available = {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available(), "mpi": dist.is_mpi_available()}
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {"backends": [name for name, present in available.items() if present], "gpus": gpus}


def probe_ffcv() -> dict[str, Any]:
    """Writes eight images to a .beton file, reads them back and compares the pixels."""
    os.environ["NUMBA_THREADING_LAYER"] = "omp"
    import numpy as np
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.pipeline.compiler import Compiler
    from ffcv.transforms import ToTensor
    from ffcv.writer import DatasetWriter

    images_NHWC = np.random.default_rng(0).integers(0, 256, (_MEMBERS, 16, 16, 3), dtype=np.uint8)

    class Images:
        def __len__(self) -> int:
            return _MEMBERS

        def __getitem__(self, index: int) -> tuple[Any, int]:
            return images_NHWC[index], index

    fields = {"image": RGBImageField(write_mode="raw"), "label": IntField()}
    DatasetWriter("probe.beton", fields, num_workers=1).from_indexed_dataset(Images())
    Compiler.set_enabled(False)  # compiling the pipeline takes 20 s and says nothing more about the installation
    pipelines = {"image": [SimpleRGBImageDecoder(), ToTensor()], "label": [IntDecoder(), ToTensor()]}
    loader = Loader(
        "probe.beton", batch_size=_MEMBERS, num_workers=1, order=OrderOption.SEQUENTIAL, pipelines=pipelines
    )
    (batch,) = [(image.clone(), label.clone()) for image, label in loader]
    assert np.array_equal(batch[0].numpy(), images_NHWC), "the pixels read differ from those written"
    assert batch[1].flatten().tolist() == list(range(_MEMBERS)), "the labels read differ from those written"
    return {}


def probe_deepspeed() -> dict[str, Any]:
    """One step of an engine on a network of two layers."""
    import deepspeed
    import torch
    import torch.distributed as dist

    if not torch.cuda.is_available():
        # Its first use would compile for minutes, and a build that is killed blocks all later ones (pytorch#189245).
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    dist.init_process_group("gloo", init_method=f"file://{os.getcwd()}/meeting", rank=0, world_size=1)
    os.environ.setdefault("LOCAL_RANK", "0")
    network = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
    before = [parameter.detach().clone() for parameter in network.parameters()]
    engine, *_ = deepspeed.initialize(
        model=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=0.1),
        config={"train_micro_batch_size_per_gpu": _MEMBERS, "zero_allow_untested_optimizer": True},
        dist_init_required=False,
    )
    engine.backward(engine(torch.ones(_MEMBERS, 4, device=engine.device)).square().sum())
    engine.step()
    changed = [not torch.equal(old, new.detach().cpu()) for old, new in zip(before, network.parameters(), strict=True)]
    assert any(changed), "the step changed no parameter"
    return {}


def probe_ray() -> dict[str, Any]:
    """Starts a local Ray as training does and runs a task on it."""
    import ray

    from coe_dist.config import parse_config
    from coe_dist.orchestration.ray_session import local_ray

    with local_ray(parse_config({"name": "doctor", "workers": {"device": "cpu"}})):
        total = ray.get(ray.remote(lambda: sum(range(_MEMBERS))).remote(), timeout=60)
    assert total == sum(range(_MEMBERS))
    return {}


def probe_mlflow() -> dict[str, Any]:
    """Logs a metric to a temporary sqlite store and reads it back."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{os.getcwd()}/probe.db")
    experiment = client.create_experiment("probe", artifact_location=f"file://{os.getcwd()}/artifacts")
    run = client.create_run(experiment).info.run_id
    client.log_metric(run, "probe", 0.5)
    client.set_terminated(run)
    assert client.get_run(run).data.metrics == {"probe": 0.5}
    return {}


PROBES: dict[str, Callable[[], dict[str, Any]]] = {
    "torch.distributed": probe_torch,
    "FFCV": probe_ffcv,
    "DeepSpeed": probe_deepspeed,
    "Ray": probe_ray,
    "MLflow": probe_mlflow,
}

if __name__ == "__main__":
    told = json.dumps(PROBES[sys.argv[1]]())
    sys.stderr.flush()
    print(f"\n{told}", flush=True)
    leave()  # as the workers do: what is probed is whether the component works, not how it is torn down
