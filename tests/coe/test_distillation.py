import pytest
import torch
import torch.nn.functional as F

from coe_dist.coe.distillation import BYTES_PER_LOGIT, distillation_losses, pack_hints, unpack_hints
from coe_dist.coe.teachers import build_teacher


def logits_of(rows: int, classes: int, seed: int = 0, scale: float = 4.0) -> torch.Tensor:
    return scale * torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("classes", "top"), [(5, 5), (1000, 32), (65_536, 32)])
def test_hints_hold_the_largest_logits_and_their_classes(classes: int, top: int) -> None:
    logits = logits_of(6, classes)
    hints = pack_hints(logits, top)
    assert hints.dtype == torch.uint8
    assert hints.shape == (6, BYTES_PER_LOGIT * top)
    values, found = unpack_hints(hints)
    wanted, places = logits.topk(top, 1)
    assert torch.equal(found, places)
    assert torch.allclose(values.float(), wanted - wanted[:, :1], atol=0, rtol=5e-4)
    assert (values[:, 0] == 0).all()


def test_hints_of_no_rows_and_of_extreme_logits() -> None:
    values, classes = unpack_hints(pack_hints(torch.zeros(0, 9), 3))
    assert values.shape == classes.shape == (0, 3)
    values, _ = unpack_hints(pack_hints(torch.tensor([[0.0, 1e9, -1e9]]), 3))
    assert torch.isfinite(values).all()


def test_the_loss_with_all_classes_is_the_usual_one() -> None:
    student, teacher = logits_of(7, 12, 1).double(), logits_of(7, 12, 2)
    got = distillation_losses(student, pack_hints(teacher, 12), 2.5)
    usual = F.kl_div(
        torch.log_softmax(student / 2.5, 1), torch.softmax(teacher.double() / 2.5, 1), reduction="none"
    ).sum(1)
    assert torch.allclose(got, 2.5**2 * usual, rtol=1e-3)
    assert (got > 0.1).all()


def test_classes_beyond_the_top_count_as_impossible() -> None:
    teacher = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0]])
    hints = pack_hints(teacher, 2)
    target = torch.softmax(torch.tensor([5.0, 4.0]), 0)
    student = torch.tensor([[1.0, -1.0, 0.5, 3.0, 0.0]], requires_grad=True)
    loss = distillation_losses(student, hints, 1.0)
    wanted = (target * (target.log() - torch.log_softmax(student, 1)[0, :2])).sum()
    assert torch.allclose(loss, wanted)
    (gradient,) = torch.autograd.grad(loss, student)
    full = torch.tensor([[*target.tolist(), 0.0, 0.0, 0.0]])
    assert torch.allclose(gradient, torch.softmax(student, 1) - full, atol=1e-6)  # pulled to 0 beyond the top
    perfect = torch.cat([target.log(), torch.full((3,), -40.0)])[None]
    assert float(distillation_losses(perfect, hints, 1.0)) == pytest.approx(0.0, abs=1e-4)


def test_a_teacher_normalises_as_its_weights_expect_and_resizes() -> None:
    arguments = {"classes": 7, "mean": [0.1], "std": [0.2]}
    coloured = build_teacher("timm/test_vit", channels=3, resolution=160, **arguments)
    mean = torch.tensor(coloured.network.pretrained_cfg["mean"])
    assert torch.allclose(coloured.normalise.mean.flatten(), mean)
    assert coloured(torch.zeros(2, 3, 40, 40, dtype=torch.uint8)).shape == (2, 7)
    grey = build_teacher("test_efficientnet", channels=1, resolution=None, **arguments)
    assert grey.normalise.mean.flatten().tolist() == pytest.approx([0.1])
    with pytest.raises(ValueError, match=r"^teacher: 'efficientnet_b00' is not allowed; .*efficientnet_b0"):
        build_teacher("efficientnet_b00", channels=3, resolution=None, **arguments)
