"""What a teacher is asked, and which files of weights are refused and how."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from parallel.parity_cases import build_step
from reference import Case, batch_of
from safetensors.torch import save_file
from small_data import small_config
from trained_run import INFO

from coe_dist.coe.backbones import build_classifier
from coe_dist.config import parse_config
from coe_dist.errors import InputError
from coe_dist.parallel.groups import create_groups
from coe_dist.training.step import MicroBatch, StepSums
from coe_dist.training.teacher import configured_teacher

NETWORK = "test_efficientnet"


def test_a_teacher_looks_once_at_each_image_and_experts_send_back_plain_losses() -> None:
    """Every image goes to two experts; what they report must not depend on the teacher."""
    case = Case(1, 3, 2, distilled=0.9, precision="fp64", batchnorm="group")
    reported, rows, values = [], [], []
    for distilled in (0.9, 0.0):
        step = build_step(Case(**{**vars(case), "distilled": distilled}), create_groups(3, timeout_seconds=300), None)
        if step.teacher is not None:
            step.teacher.network.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
        start_labels = step.router.start_labels

        def keep(losses_Bk: torch.Tensor, routing: Any, start_labels: Any = start_labels) -> Any:
            reported.append(losses_Bk.clone())
            return start_labels(losses_Bk, routing)

        step.router.start_labels = keep  # type: ignore[method-assign]
        sums = StepSums()
        assert step.step([MicroBatch(*batch_of(case, 0, 0))], sums)
        values.append(sums.values)
    taught, plain = values
    assert "distillation_loss" not in plain
    mixed = 0.1 * plain["expert_loss"] + 0.9 * taught["distillation_loss"]
    assert taught["expert_loss"].item() == pytest.approx(mixed.item(), rel=1e-9)
    assert rows == [case.samples]
    assert torch.equal(*reported)


def config_of(tmp_path: Path, **distillation: Any) -> Any:
    return parse_config(small_config(tmp_path, tmp_path, distillation={"teacher": NETWORK, **distillation}))


def state(**options: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return timm.create_model(NETWORK, **{"num_classes": 10, "in_chans": 1, **options}).state_dict()


@pytest.mark.parametrize("kind", ["safetensors", "plain", "averages", "module"])
def test_weights_come_in_the_usual_wrappings(tmp_path: Path, kind: str) -> None:
    weights, path = state(), tmp_path / "teacher.pth"
    if kind == "safetensors":
        path = tmp_path / "teacher.safetensors"
        save_file(weights, path)
    elif kind == "averages":
        other = {name: torch.zeros_like(value) for name, value in weights.items()}
        torch.save({"epoch": 3, "state_dict": other, "state_dict_ema": weights}, path)
    elif kind == "module":
        torch.save({f"module.{name}": value for name, value in weights.items()}, path)
    else:
        torch.save(weights, path)
    teacher = configured_teacher(config_of(tmp_path, weights=str(path)), INFO, torch.device("cpu"))
    assert teacher is not None
    assert not any(parameter.requires_grad for parameter in teacher.network.parameters())
    loaded = teacher.network.network.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in weights.items())
    assert teacher.top == 10  # of 32: there are no more classes
    images = torch.randint(0, 256, (3, 1, 28, 28), dtype=torch.uint8)
    assert teacher.hints(images).shape == (3, teacher.bytes_per_image) == (3, 40)
    assert teacher.hints(images[:0]).shape == (0, 40)


def test_a_network_trained_here_teaches_by_its_own_answers(tmp_path: Path) -> None:
    options: dict[str, Any] = {"width": 0.3}
    ours = build_classifier("small_cnn", options, channels=1, classes=10, mean=INFO.mean, std=INFO.std, seed=5).eval()
    save_file(ours.state_dict(), tmp_path / "single.safetensors")
    config = config_of(tmp_path, teacher="small_cnn", options=options, weights=str(tmp_path / "single.safetensors"))
    teacher = configured_teacher(config, INFO, torch.device("cpu"))
    assert teacher is not None
    images = torch.randint(0, 256, (3, 1, 28, 28), dtype=torch.uint8)
    assert torch.equal(teacher.network(images), ours(images))
    for changes, message in (
        ({"teacher": "no_such_net"}, "distillation.teacher: 'no_such_net' is not allowed; no such network"),
        ({"options": {"width": -1.0}}, "distillation.options.width: -1.0 is not allowed"),
        ({"options": {"width": 0.4}}, "distillation.weights: .* does not fit the network"),
    ):
        other = parse_config({**config.model_dump(), "distillation": {**config.distillation.model_dump(), **changes}})
        with pytest.raises(InputError, match=f"^{message}"):
            configured_teacher(other, INFO, torch.device("cpu"))


class NotTensors:
    pass


def test_files_that_do_not_fit_are_refused_in_one_line(tmp_path: Path) -> None:
    torch.save(state(num_classes=9), tmp_path / "nine.pth")
    torch.save({"a": NotTensors()}, tmp_path / "code.pth")
    torch.save({"epoch": 3}, tmp_path / "none.pth")
    (tmp_path / "text.safetensors").write_text("hello")
    renamed = {name.replace("conv_stem", "stem"): value for name, value in state().items()}
    torch.save(renamed, tmp_path / "renamed.pth")
    for weights, message in (
        ("missing.pth", "there is no such file"),
        ("nine.pth", r"does not fit the network: classifier.weight is \[9, 256\], not \[10, 256\]"),
        ("code.pth", "give a state dict as safetensors or of tensors alone"),
        ("none.pth", "it holds no state dict"),
        ("text.safetensors", "give a state dict as safetensors or of tensors alone"),
        ("renamed.pth", "conv_stem.weight is missing, stem.weight is unknown"),
    ):
        with pytest.raises(InputError, match=rf"^distillation.weights: .*{message}") as error:
            configured_teacher(config_of(tmp_path, weights=str(tmp_path / weights)), INFO, torch.device("cpu"))
        assert "\n" not in str(error.value)
    config = config_of(tmp_path, weights="x", teacher="no_such_net")
    with pytest.raises(InputError, match=r"^distillation\.teacher: 'no_such_net' is not allowed"):
        configured_teacher(config, INFO, torch.device("cpu"))
