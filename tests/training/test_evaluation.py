"""Distributed evaluation equals a loop over single images, on any world size and for any number of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from reference import CLASSES, build_networks
from training import evaluation_cases as cases

from coe_dist.coe.calibration import ece
from coe_dist.errors import InputError
from coe_dist.tracking.per_image import PerImage
from coe_dist.training.evaluation import Records, calibrated_threshold, class_table, summarise

DELEGATOR_MACS, EXPERT_MACS = 100, [1000, 1500, 2000, 3000]


def brute_force(folder: Path, experts: int, images: int, final: str, ranks: int) -> list[dict[str, Any]]:
    """One image after the other through plain networks in eval mode: no batches, no groups."""
    networks = build_networks(cases.case_of(experts, ranks))
    for name, network in networks.items():
        files = sorted(folder.glob(f"{experts}-{name}-rank*.pt"))
        states = [torch.load(file) for file in files]
        for key, value in states[0].items():  # replicas agree once their statistics are averaged
            if not key.endswith("num_batches_tracked"):
                assert all(torch.allclose(state[key], value, rtol=1e-12) for state in states)
        network.load_state_dict(states[0])
        network.eval()
    pixels, labels = cases.split(images)
    rows = []
    with torch.no_grad():
        for image, label in zip(pixels, labels.tolist(), strict=True):
            rough, selection = networks["delegator"](image[None])
            answers = [networks[f"expert {expert}"](image[None])[0].softmax(0) for expert in range(experts)]
            rough, selected = rough[0].softmax(0), int(selection[0].argmax())
            answer = answers[selected] if final == "expert" else (answers[selected] + rough) / 2
            rows.append(
                {
                    "label": label,
                    "confidence": float(rough.max()),
                    "delegator": int(rough.argmax()) == label,
                    "selected": selected,
                    "experts": [int(probabilities.argmax()) == label for probabilities in answers],
                    "final": int(answer.argmax()) == label,
                    "final confidence": float(answer.max()),
                    "delegator class": int(rough.argmax()),
                    "final class": int(answer.argmax()),
                    "selection confidence": float(selection[0].softmax(0).max()),
                }
            )
    return rows


def check_statistics(folder: Path, ranks: int) -> None:
    """Running statistics are averaged over the ranks by the rows each has seen: rank r has seen r + 1."""
    rows = range(1, ranks + 1)
    for rank in range(ranks):
        state = torch.load(folder / f"4-delegator-rank{rank}.pt")
        mean = sum(seen * 0.1 * seen for seen in rows) / sum(rows)
        variance = sum(seen * 0.05 * seen for seen in rows) / sum(rows)
        torch.testing.assert_close(state["trunk.1.running_mean"], torch.full((4,), mean).double())
        torch.testing.assert_close(state["trunk.1.running_var"], torch.full((4,), variance).double())


def rows_of(records: Records) -> list[dict[str, Any]]:
    return [
        {
            "label": int(records.labels_N[i]),
            "confidence": float(records.confidence_N[i]),
            "delegator": bool(records.delegator_N[i]),
            "selected": int(records.selected_N[i]),
            "experts": records.experts_NE[i].tolist(),
            "final": bool(records.final_N[i]),
            "final confidence": float(records.final_confidence_N[i]),
            "delegator class": int(records.delegator_class_N[i]),
            "final class": int(records.final_class_N[i]),
            "selection confidence": float(records.selection_confidence_N[i]),
        }
        for i in range(len(records.ids_N))
    ]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_image_once_and_every_figure_as_in_a_loop_over_images(ranks: int, tmp_path: Path) -> None:
    if ranks == 1:
        cases.run(tmp_path)
    else:
        run_ranks(ranks, "training.evaluation_cases:run", tmp_path)
    check_statistics(tmp_path, ranks)
    varied = set()
    for experts in cases.EXPERTS:
        for images in cases.IMAGES:
            for final in ("expert", "average"):
                expected = brute_force(tmp_path, experts, images, final, ranks)
                for rank in range(ranks):
                    records = torch.load(
                        tmp_path / f"records-{final}-{experts}-{images}-rank{rank}.pt", weights_only=False
                    )
                    assert records.ids_N.tolist() == list(range(images))
                    got = rows_of(records)
                    for row, want in zip(got, expected, strict=True):
                        for field in ("confidence", "final confidence", "selection confidence"):
                            assert abs(row.pop(field) - want[field]) < 1e-12
                        assert row == {key: value for key, value in want.items() if "confidence" not in key}
                    check_figures(records, expected, experts)
                    check_file(records, tmp_path / "images-test.npz")
                varied.update((row["selected"], row["final"], row["delegator"]) for row in expected)
    assert len(varied) > 4, "the networks of this test answer everything alike"


def check_file(records: Records, path: Path) -> None:
    """What is kept of each image is read back as it was."""
    path.write_bytes(records.per_image().to_bytes())
    rows = PerImage.read(path)
    assert (rows.ids_N.tolist(), rows.labels_N.tolist()) == (records.ids_N.tolist(), records.labels_N.tolist())
    assert rows.confidence_N.tolist() == records.confidence_N.tolist()  # exactly: thresholds are held against it
    assert rows.selected_N.tolist() == records.selected_N.tolist()
    assert rows.right_NE.tolist() == records.experts_NE.tolist()
    assert (rows.delegator_class_N == rows.labels_N).tolist() == records.delegator_N.tolist()
    assert (rows.final_class_N == rows.labels_N).tolist() == records.final_N.tolist()


def counted(rows: list[dict[str, Any]], confidences: list[float], macs: list[int], threshold: float | None) -> Any:
    """Exit rate, average MACs and top-1 by counting; confidences are the records' own, so that ties fall alike."""
    early = [threshold is not None and confidence >= threshold for confidence in confidences]
    spent = sum(macs[row["selected"]] for row, e in zip(rows, early, strict=True) if not e)
    right = sum(row["delegator"] if e else row["final"] for row, e in zip(rows, early, strict=True))
    return sum(early) / len(rows), DELEGATOR_MACS + spent / len(rows), right / len(rows)


def check_figures(records: Records, rows: list[dict[str, Any]], experts: int) -> None:
    """Each figure of the summary, the curve and the calibration by counting over images."""
    macs, confidences = EXPERT_MACS[:experts], records.confidence_N.tolist()

    def share(flags: list[bool]) -> float:
        return sum(flags) / len(flags)

    for threshold in (None, 0.0, float(records.confidence_N.median()), 1.1):
        exit_rate, average_macs, top1 = counted(rows, confidences, macs, threshold)
        result = summarise(
            records,
            split="test",
            delegator_macs=DELEGATOR_MACS,
            expert_macs=macs,
            threshold=threshold,
            curve=threshold is None,
        )
        for point in result.pop("curve", []):
            exits, average, right = counted(rows, confidences, macs, point["threshold"])
            assert point == {
                "threshold": point["threshold"],
                "exit_rate": exits,
                "average_macs": round(average),
                "top1": right,
            }
            assert type(point["average_macs"]) is int
        answered = [
            (confidence, row["delegator"])
            if threshold is not None and confidence >= threshold
            else (row["final confidence"], row["final"])
            for row, confidence in zip(rows, confidences, strict=True)
        ]
        rough = [(confidence, row["delegator"]) for row, confidence in zip(rows, confidences, strict=True)]
        for system, pairs in (("coe", answered), ("delegator", rough)):
            assert result["ece"].pop(system) == pytest.approx(ece(*zip(*pairs, strict=True)), abs=1e-9)
        assert result.pop("ece") == {}
        chosen = [[row["experts"][expert] for row in rows if row["selected"] == expert] for expert in range(experts)]
        assert result == {
            "split": "test",
            "images": len(rows),
            "top1": {
                "coe": top1,
                "delegator": share([row["delegator"] for row in rows]),
                "oracle": share([any(row["experts"]) for row in rows]),
                "experts": [share([row["experts"][expert] for row in rows]) for expert in range(experts)],
            },
            "exit_rate": exit_rate,
            "average_macs": round(average_macs),
            "load": [len(flags) / len(rows) for flags in chosen],
            "expert_accuracy": [share(flags) if flags else None for flags in chosen],
            "threshold": threshold,
            "macs": {"delegator": DELEGATOR_MACS, "experts": macs},
        }
        assert {type(result[field]) for field in ("images", "average_macs")} == {int}

    without_exit = counted(rows, confidences, macs, None)[1]
    for budget in (DELEGATOR_MACS, DELEGATOR_MACS + 300, 0.6 * without_exit, 0.9 * without_exit, 2 * without_exit):
        threshold = calibrated_threshold(records, delegator_macs=DELEGATOR_MACS, expert_macs=macs, budget=budget)
        assert threshold is not None
        outcomes = [counted(rows, confidences, macs, candidate) for candidate in (0.0, *confidences, 2.0)]
        fewest_exits = min(exit_rate for exit_rate, average_macs, _ in outcomes if average_macs <= budget)
        assert counted(rows, confidences, macs, threshold)[0] == fewest_exits
        assert counted(rows, confidences, macs, threshold)[1] <= budget
    assert calibrated_threshold(records, delegator_macs=1, expert_macs=macs, budget=None) is None
    reached = {top1: average for _, average, top1 in sorted(outcomes, key=lambda outcome: -outcome[1])}
    figures = {"delegator_macs": DELEGATOR_MACS, "expert_macs": macs, "budget": None}
    for accuracy in reached:
        threshold = calibrated_threshold(records, accuracy=accuracy, **figures)  # type: ignore[arg-type]
        cheapest = min(average for top1, average in reached.items() if top1 >= accuracy)
        assert counted(rows, confidences, macs, threshold)[1] == cheapest
    with pytest.raises(InputError, match=rf"^--min-accuracy: 1.5 .* reaches is {max(reached)}, of these"):
        calibrated_threshold(records, accuracy=1.5, **figures)  # type: ignore[arg-type]

    table = class_table(records, tuple("abcde"))
    for label in range(CLASSES):
        for expert in range(experts):
            cell = [row for row in rows if (row["label"], row["selected"]) == (label, expert)]
            assert table["selected"][label][expert] == len(cell)
            assert table["correct"][label][expert] == sum(row["experts"][expert] for row in cell)
        assert table["images_per_class"][label] == sum(row["label"] == label for row in rows)
