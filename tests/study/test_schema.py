"""A study's file: every refusal is one line that names the field and what is allowed; equal trainings are one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from small_data import small_config, write_config

from coe_dist.errors import InputError, TrainingError
from coe_dist.study.display import parse_seeds
from coe_dist.study.schema import StudyConfig, find_study, load_study
from coe_dist.study.study import missing_starts
from coe_dist.study.trainings import Training, trainings_of

STUDIES = Path(__file__).parents[2] / "configs" / "studies"


def content(**changes: Any) -> dict[str, Any]:
    study: dict[str, Any] = {
        "name": "tiny",
        "base": "base.yaml",
        "seeds": [0, 1],
        "curves": {
            "single": {"kind": "single", "points": {"a": [], "b": ["experts.options.width=0.2"]}},
            "coe": {"kind": "collaboration", "points": {"a": []}},
        },
        "frontier": {"single": ["single"], "collaborations": ["coe"]},
    }
    return {**study, **changes}


def loaded(folder: Path, **changes: Any) -> StudyConfig:
    write_config(folder / "base.yaml", small_config(folder / "data", folder / "runs"))
    (folder / "study.yaml").write_text(yaml.safe_dump(content(**changes), sort_keys=False))
    return load_study(folder / "study.yaml")


def coe(*overrides: str) -> dict[str, Any]:
    return {"curves": {"coe": {"kind": "collaboration", "points": {"a": list(overrides)}}}, "frontier": None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sedes": [0]}, "sedes: unknown key; allowed here: name, base, overrides, seeds, curves, parallel, results, "),
        ({"seeds": []}, "seeds: [] is not allowed; give "),
        ({"seeds": [1, 1]}, "seeds: [1, 1] is not allowed; give each seed once"),
        ({"seeds": [-1]}, "seeds.0: -1 is not allowed; give "),
        ({"name": "a/b"}, "name: 'a/b' is not allowed; give up to 30 letters"),
        ({"parallel": 0}, "parallel: 0 is not allowed; give a whole number from 1 to 1024"),
        ({"curves": {}}, "curves: {} is not allowed; give "),
        ({"curves": {"x": {"kind": "double", "points": {"a": []}}}}, "curves.x.kind: 'double' is not allowed; give "),
        ({"curves": {"x": {"kind": "single"}}}, "curves.x.points: missing; it must be given"),
        (
            {"curves": {"x": {"kind": "single", "points": {"a": []}, "sed": 1}}},
            "curves.x.sed: unknown key; allowed here: kind, overrides, points, seeds, test, start",
        ),
        (
            {"frontier": {"single": ["coe"], "collaborations": ["coe"]}},
            "frontier.single: 'coe' is not allowed; give a curve of kind single that is tested (single)",
        ),
        (
            {"frontier": {"single": ["single"], "collaborations": ["coe", "cow"]}},
            "frontier.collaborations: 'cow' is not allowed; give a curve of kind collaboration that is tested (coe)",
        ),
        (
            {"frontier": {"single": ["single"], "collaborations": ["coe"], "baselines": ["single"]}},
            "frontier.baselines: 'single' is not allowed; give a curve of kind collaboration that is tested (coe)",
        ),
        ({"baseline": "coe/b"}, "baseline: 'coe/b' is not allowed; give one of single/a, single/b, coe/a"),
    ],
)
def test_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        loaded(tmp_path, **changes)
    assert str(caught.value).startswith(message)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("experts.count=1", "curves.coe.points.a: experts.count: 1 is not allowed; give a whole number from 2 to 4096"),
        ("experts.cuont=3", "curves.coe.points.a: experts.cuont: unknown key; allowed here: network, options, "),
        ("experts.count", "curves.coe.points.a: override 'experts.count' is not allowed; write key=value"),
    ],
)
def test_an_override_is_refused_with_its_point(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        trainings_of(loaded(tmp_path, **coe(override)))
    assert str(caught.value).startswith(message)


def test_what_matches_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"--only: 'coe/b' is not allowed; it matches none of single/a, single/b, coe/a"
    ):
        trainings_of(loaded(tmp_path), only="coe/b")
    with pytest.raises(InputError, match=r"study: 'fronteir' is not allowed; give a YAML file or one of .*frontier"):
        find_study("fronteir")
    with pytest.raises(InputError, match=r"none\.yaml: no such study file"):
        find_study(str(tmp_path / "none.yaml"))


@pytest.mark.parametrize("text", ["", "0,", "a", "-1", "0,0", "1.5", "4294967296"])
def test_seeds_that_are_none(text: str) -> None:
    with pytest.raises(InputError, match="--seeds: "):
        parse_seeds(text)


def test_the_grid_goes_seed_by_seed(tmp_path: Path) -> None:
    study = loaded(tmp_path)
    order = [(t.label, t.seed) for t in trainings_of(study)]
    labels = ["single/a", "single/b", "coe/a"]
    assert order == [(label, seed) for seed in (0, 1) for label in labels]
    assert [(t.label, t.seed) for t in trainings_of(study, only="single", seeds=[5])] == [
        ("single/a", 5),
        ("single/b", 5),
    ]
    assert [t.label for t in trainings_of(study, only="*/a", seeds=[5])] == ["single/a", "coe/a"]


def digest(folder: Path, *overrides: str, kind: str = "collaboration") -> str:
    changes = {"curves": {"x": {"kind": kind, "points": {"a": list(overrides)}}}, "frontier": None}
    (training,) = trainings_of(loaded(folder, **changes), seeds=[0])
    return training.digest


def test_a_digest_knows_what_changes_the_networks(tmp_path: Path) -> None:
    plain = digest(tmp_path)
    for idle in ("name=other", "runs_dir=elsewhere", "tracking.every_steps=7", "workers.count=1", "experts.count=3"):
        assert digest(tmp_path, idle) == plain  # experts.count=3 is the base's own
    for other in (
        "seed=1",
        "experts.count=4",
        "training.epochs=3",
        "router.variance=false",
        "delegator.options.width=1",
    ):
        # the seed of the point is overruled by the study's
        assert (digest(tmp_path, other) == plain) == (other == "seed=1")
    single = digest(tmp_path, kind="single")
    assert single != plain
    for idle in ("router.variance=false", "delegator.options.width=1", "experts.count=5", "early_exit.final=average"):
        assert digest(tmp_path, idle, kind="single") == single
    assert digest(tmp_path, "experts.options.width=0.3", kind="single") != single


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_studies_of_this_project_are_whole(path: Path) -> None:
    study = load_study(path)
    assert study.name == path.stem
    trainings = trainings_of(study)
    tested = [t for t in trainings if t.test]
    assert {len({t.seed for t in tested if t.label == label}) for label in {t.label for t in tested}} <= {3}
    names = [t.config.name for t in trainings]
    assert len(set(names)) == len(names)
    searched = [t for t in trainings if not t.test]
    assert not {t.digest for t in searched} & {t.digest for t in tested}  # no setting is chosen on a reported seed
    if study.frontier is not None:
        sizes = {str(t.config.experts.options) for t in tested if t.curve in study.frontier.single}
        assert len(sizes) >= 6
        counts = {t.config.experts.count for t in tested if t.curve in study.frontier.collaborations}
        assert counts >= {2, 4, 8, 16}


def test_a_collaboration_may_start_from_a_single_network(tmp_path: Path) -> None:
    def study(**start: str) -> list[Training]:
        curves = {
            "single": {"kind": "single", "points": {"a": [], "b": ["experts.options.width=0.3"]}},
            "coe": {"kind": "collaboration", "points": {"a": []}, "start": start},
        }
        return trainings_of(loaded(tmp_path, curves=curves), seeds=[3])

    plain, (_, _, started) = study()[-1], study(experts="single/a")
    other = study(experts="single/b")[-1]
    assert len({plain.digest, started.digest, other.digest}) == 3
    ((section, start),) = started.starts
    assert (section, start.label, start.seed) == ("experts", "single/a", 3)
    assert (plain.ready, started.ready) == (True, False)
    with pytest.raises(TrainingError, match="coe/a starts or learns from single/a seed 3, which failed"):
        started.job()
    with pytest.raises(InputError, match=r"^curves.coe.start.experts: 'coe/a' is not allowed; give .*single/b"):
        study(experts="coe/a")


def test_a_training_may_learn_from_a_single_network(tmp_path: Path) -> None:
    section = "distillation={teacher: small_cnn, weights: start, weight: 0.5}"

    def study(*overrides: str, experts: str = "single/a", **start: str) -> list[Training]:
        shared = {"points": {"a": []}, "overrides": list(overrides)}
        curves = {
            "single": {"kind": "single", "points": {"a": [], "b": ["experts.options.width=0.3"]}},
            "taught": {"kind": "single", "start": start, **shared},
            "coe": {"kind": "collaboration", "start": {"teacher": "single/b", "experts": experts}, **shared},
        }
        return trainings_of(loaded(tmp_path, curves=curves), seeds=[3])

    _, _, taught, coe = study(section, teacher="single/b")
    assert [(name, one.label) for name, one in coe.starts] == [("teacher", "single/b"), ("experts", "single/a")]
    assert coe.config.distillation is not None
    assert coe.config.distillation.options == {"width": 0.3}
    elsewhere, otherwise = section.replace("start", "elsewhere"), section.replace("0.5", "0.6")
    assert study(elsewhere, teacher="single/b")[2].digest == taught.digest  # the file is the study's business
    assert study(otherwise, teacher="single/b")[2].digest != taught.digest
    assert study(section, teacher="single/a")[2].digest != taught.digest
    for message, overrides, start in (
        ("curves.taught.points.a: distillation: None is not allowed; start.teacher", (), {"teacher": "single/b"}),
        ("curves.taught.start.experts: 'single/b' is not allowed; only collab", (section,), {"experts": "single/b"}),
        ("curves.taught.start.teacher: 'taught/a' is not allowed; it is a", (section,), {"teacher": "taught/a"}),
    ):
        with pytest.raises(InputError, match=f"^{message}"):
            trainings_of(
                loaded(
                    tmp_path,
                    curves={
                        "single": {"kind": "single", "points": {"a": [], "b": ["experts.options.width=0.3"]}},
                        "taught": {"kind": "single", "start": start, "points": {"a": []}, "overrides": list(overrides)},
                    },
                    frontier=None,
                    baseline=None,
                )
            )


def test_what_a_training_starts_from_may_have_a_teacher(tmp_path: Path) -> None:
    learning = {"kind": "single", "overrides": ["distillation={teacher: small_cnn, weights: start}"]}

    def study(first: str, second: str) -> list[Training]:
        curves = {
            "single": {"kind": "single", "points": {"a": []}},
            "first": {**learning, "start": {"teacher": first}, "points": {"a": []}},
            "second": {**learning, "start": {"teacher": second}, "points": {"a": []}},
            "coe": {"kind": "collaboration", "start": {"experts": "second/a"}, "points": {"a": []}},
        }
        return trainings_of(loaded(tmp_path, curves=curves, frontier=None, baseline=None), seeds=[3])

    single, first, second, coe = study("single/a", "first/a")
    assert missing_starts([coe]) == [single, first, second]
    assert missing_starts([first, coe]) == [single, first, second]
    assert len({one[-1].digest for one in (study("single/a", "first/a"), study("single/a", "single/a"))}) == 2
    with pytest.raises(InputError, match=r"^curves.first.start.teacher: 'second/a' is not allowed; it is a"):
        study("second/a", "first/a")


def test_a_training_is_the_job_of_one_plain_process(tmp_path: Path) -> None:
    single, _, collaboration = (t for t in trainings_of(loaded(tmp_path), seeds=[3]))
    assert isinstance(single, Training)
    job = single.job("abc")
    assert (job.task, job.test, job.mlflow_run_id) == ("baseline", True, "abc")
    assert job.network is not None
    assert job.network.options == {"width": 0.1}
    assert job.config.workers.count == 1
    assert (collaboration.job().task, collaboration.job().network) == ("train", None)
    assert (single.samples, collaboration.samples) == (2, 4)  # 2 epochs; 2 of 3 experts see an image
