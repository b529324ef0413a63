"""`coe-dist export onnx`: a run as ONNX graphs, for runtimes without Python or PyTorch.

    DIR/delegator.onnx    images -> class_logits [N,C], selection_logits [N,E]
    DIR/expert-0000.onnx  images -> class_logits [N,C]; one file for each expert
    DIR/manifest.json     what must be known besides: see _manifest
    DIR/prepare.py        image files -> `images`, as for the run's validation: coe_dist/preparation.py

`images` is uint8 [N,channels,resolution,resolution] with any N from 1; normalisation is part of each graph, and weights
are float32. onnx_runner.py shows what to do with the graphs.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import tempfile
import warnings as python_warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from coe_dist import preparation
from coe_dist.errors import InputError
from coe_dist.extras import require
from coe_dist.inference import CollaborationOfExperts, PretrainedConfig, expert_stems, read_config
from coe_dist.training.chosen import LATEST, Weights
from coe_dist.training.export import export_weights
from coe_dist.training.new_folder import check_new, new_folder

PACKAGES = ("onnx", "onnxruntime", "onnxscript")
TOLERANCE = 1e-4  # of logits, relative to the largest: graphs that are further off are not written


def export_onnx(run_dir: Path, out: Path, weights: Weights | None = None, checkpoint: str = LATEST) -> list[str]:
    """Writes the graphs and the manifest of a run to the new folder `out`; returns the warnings of export_weights.

    `out` appears whole or not at all. Raises InputError as export_weights and convert do.
    """
    require("export onnx", PACKAGES, "onnx")
    check_new(out)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "weights"
        warnings = export_weights(run_dir, folder, weights, checkpoint)
        convert(folder, out)
    return warnings


def convert(weights: Path, out: Path) -> None:
    """Turns a folder of exported weights into the new folder `out`.

    Every graph is run once in onnxruntime and compared with its network. Raises InputError when a package is missing,
    for weights that from_pretrained refuses, for a network that ONNX cannot express, and for an `out` that exists or
    cannot be written.
    """
    require("export onnx", PACKAGES, "onnx")
    check_new(out)
    model, config = CollaborationOfExperts.from_pretrained(weights).float(), read_config(weights)
    with new_folder(out) as partial:
        _write_graphs(model, config, partial)
        shutil.copyfile(preparation.__file__, partial / "prepare.py")
        (partial / "manifest.json").write_text(json.dumps(_manifest(config, partial), indent=1, ensure_ascii=False))


def _write_graphs(model: CollaborationOfExperts, config: PretrainedConfig, folder: Path) -> None:
    from coe_dist.exports.onnx_runner import DELEGATOR_OUTPUTS, EXPERT_OUTPUTS

    generator = torch.Generator().manual_seed(0)
    shape = (3, model.channels, model.resolution, model.resolution)
    images_NCHW = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    delegator = _graph(model.delegator, images_NCHW, DELEGATOR_OUTPUTS, "delegator", config)
    _write(delegator, model.delegator, images_NCHW, folder / "delegator.onnx")
    # the experts differ in their weights alone: tracing takes seconds, once for all of them
    expert = _graph(model.experts[0], images_NCHW, EXPERT_OUTPUTS, "experts", config)
    for stem, network in zip(expert_stems(config.count), model.experts, strict=True):
        _write(expert, network, images_NCHW, folder / f"{stem}.onnx")


def _graph(
    network: nn.Module, images_NCHW: torch.Tensor, outputs: Sequence[str], field: str, config: PretrainedConfig
) -> Any:
    """The network as an onnx.ModelProto. Not optimised, so that each weight keeps its name; onnxruntime optimises when
    it loads."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with python_warnings.catch_warnings(), torch.no_grad():
            python_warnings.simplefilter("ignore")
            program = torch.onnx.export(
                network,
                (images_NCHW,),
                dynamo=True,
                input_names=["images"],
                output_names=list(outputs),
                dynamic_shapes=({0: torch.export.Dim("N", min=1)},),
                optimize=False,
                verbose=False,
            )
    except Exception as error:  # whatever torch raises for what it cannot trace or express
        cause: BaseException = error
        while cause.__cause__ is not None:  # torch's own message is advice for its developers
            cause = cause.__cause__
        reason = re.sub(r"\x1b\[\d*m", "", f"{type(cause).__name__}: {cause}".splitlines()[0])[:200]
        section = getattr(config, field)
        options = f" with {section.options}" if section.options else ""
        raise InputError(
            f"{field}.network: {section.network!r}{options} cannot be exported to ONNX ({reason})"
        ) from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    assert program is not None
    graph = program.model_proto
    for part in (graph, graph.graph, *graph.graph.node, *graph.graph.value_info):
        part.ClearField("metadata_props")  # stack traces with this machine's folders
        part.ClearField("doc_string")
    return graph


def _write(graph: Any, network: nn.Module, images_NCHW: torch.Tensor, path: Path) -> None:
    """Writes the graph with the network's weights. Raises InputError when onnxruntime answers otherwise than torch."""
    import onnxruntime  # type: ignore[import-untyped]
    from onnx import numpy_helper

    state = network.state_dict()
    for weight in graph.graph.initializer:
        if weight.name in state:
            weight.CopyFrom(numpy_helper.from_array(state[weight.name].contiguous().numpy(), weight.name))
    content = graph.SerializeToString()
    path.write_bytes(content)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors; its warnings tell of optimisations that it leaves out
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    with torch.no_grad():
        answers = network(images_NCHW)
    for wanted, found in zip(
        answers if isinstance(answers, tuple) else (answers,),
        session.run(None, {"images": images_NCHW.numpy()}),
        strict=True,
    ):
        error = float((wanted - torch.from_numpy(found)).abs().max())
        if not error <= TOLERANCE * max(1.0, float(wanted.abs().max())):
            raise InputError(f"{path.name}: onnxruntime answers otherwise than the network, by {error:g} in a logit")


def _manifest(config: PretrainedConfig, folder: Path) -> Mapping[str, Any]:
    """MACs: of one image. threshold: confidence from which the delegator's answer counts; null: never. final: what
    answers an image that goes on, its "expert" or the "average" of it and the delegator. mean and std are for the
    record: the graphs apply them."""

    def entry(stem: str, macs: int) -> dict[str, Any]:
        content = (folder / f"{stem}.onnx").read_bytes()
        return {
            "file": f"{stem}.onnx",
            "macs": macs,
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }

    copied = (
        "classes",
        "channels",
        "resolution",
        "preparation",
        "mean",
        "std",
        "threshold",
        "final",
        "weights",
        "run",
        "step",
        "epoch",
    )
    described = config.model_dump(mode="json")
    return {
        "format": 1,
        "input": "images: uint8 [N, channels, resolution, resolution], from 0 to 255",
        **{name: described[name] for name in copied},
        "delegator": entry("delegator", config.delegator_macs),
        "experts": [
            entry(stem, macs) for stem, macs in zip(expert_stems(config.count), config.expert_macs, strict=True)
        ],
    }
