"""The configuration: every refusal is one line with field, value and what is allowed; a stored one loads unchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coe_dist.config import RunConfig, load_config, parse_config
from coe_dist.errors import InputError
from coe_dist.training.job import Job

CONFIGS = Path(__file__).parents[1] / "configs"
NAN, INFINITY = float("nan"), float("inf")


def tree(dotted: str, value: object) -> dict[str, Any]:
    """{"name": "run", ...} with one dotted field set."""
    *sections, leaf = dotted.split(".")
    content: dict[str, Any] = {"name": "run"}
    node = content
    for section in sections:
        node = node.setdefault(section, {})
    node[leaf] = value
    return content


def refusal(content: Any) -> str:
    with pytest.raises(InputError) as caught:
        parse_config(content)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize(
    ("field", "value", "shown", "allowed"),
    [
        ("experts.count", 1, "1", "give a whole number from 2 to 4096"),
        ("experts.count", 0, "0", "give a whole number from 2 to 4096"),
        ("experts.count", 4097, "4097", "give a whole number from 2 to 4096"),
        ("experts.count", 2.5, "2.5", "give a whole number from 2 to 4096"),
        ("experts.count", "4", "'4'", "give a whole number from 2 to 4096"),
        ("experts.count", True, "True", "give a whole number from 2 to 4096"),
        ("experts.count", None, "None", "give a whole number from 2 to 4096"),
        ("experts.per_sample", 0, "0", "give a whole number from 1 to 4096"),
        (
            "experts.options.width",
            None,
            "None",
            "give a finite number, text, true or false, or a list of whole numbers",
        ),
        ("experts.options.width", NAN, "nan", "give a finite number, text, true or false, or a list of whole numbers"),
        ("experts.options", 3, "3", "give a mapping of keys"),
        ("training", None, "None", "give a mapping of keys"),
        ("training.epochs", -1, "-1", "give a whole number from 0 to 100000"),
        ("training.optimizer.learning_rate", 0, "0", "give a number above 0.0"),
        ("training.optimizer.learning_rate", NAN, "nan", "give a number above 0.0"),
        ("training.optimizer.learning_rate", INFINITY, "inf", "give a number above 0.0"),
        ("training.optimizer.learning_rate", "fast", "'fast'", "give a number above 0.0"),
        ("training.label_smoothing", 1.0, "1.0", "give a number from 0.0, below 1.0"),
        ("training.label_smoothing", NAN, "nan", "give a number from 0.0, below 1.0"),
        ("training.timeout_seconds", 1, "1", "give a number from 5 to 86400"),
        ("training.precision", "fp16", "'fp16'", "give fp32, bf16 or fp64"),
        ("training.zero_stage", 3, "3", "give a whole number from 0 to 2"),
        ("training.zero_stage", True, "True", "give a whole number from 0 to 2"),
        ("training.non_finite", "ignore", "'ignore'", "give stop or skip"),
        ("training.checkpoint_every", 0, "0", "give a whole number of at least 1"),
        ("experts.share", 0, "0", "give a number above 0.0, at most 1.0"),
        ("router.generalist_weight", 1.5, "1.5", "give a number from 0.0 to 1.0"),
        ("router.where", "rank1", "'rank1'", "give replicated, rank0 or process"),
        ("data.augmentation.flip", "maybe", "'maybe'", "give true or false"),
        ("data.folder", 3, "3", "give text"),
        ("seed", -1, "-1", "give a whole number from 0, below 4294967296"),
    ],
)
def test_a_value_that_is_not_allowed(field: str, value: object, shown: str, allowed: str) -> None:
    assert refusal(tree(field, value)) == f"{field}: {shown} is not allowed; {allowed}"


@pytest.mark.parametrize("name", ["", "..", ".hidden", "a/b", "../a", "/tmp/a", "a\n", "a b", "ä", "a" * 101])
def test_a_name_cannot_leave_the_runs_folder(name: str) -> None:
    message = refusal({"name": name})
    assert message.startswith(f"name: {name!r} is not allowed; give up to 100 letters")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"name": "a", "experts": {"count": 4, "per_sample": 5}},
            "experts.per_sample: 5 is not allowed; give a whole number from 1 to experts.count = 4",
        ),
        (
            {"name": "a", "experts": {"per_sample": 1}},
            "experts.per_sample: 1 is not allowed; "
            "router.generalist_weight = 0.2 > 0 needs at least 2 experts per sample",
        ),
        (
            {"name": "a", "experts": {"per_sample": 1}, "router": {"generalist_weight": 0}},
            "experts.per_sample: 1 is not allowed; it leaves selection without a signal; give 2 or more, "
            "or set router.selection: frozen",
        ),
        (
            {"name": "a", "training": {"accumulation": 3, "global_batch": 256}},
            "training.accumulation: 3 is not allowed; it must divide training.global_batch = 256",
        ),
        (
            {"name": "a", "early_exit": {"macs_budget": 1000, "threshold": 0.5}},
            "early_exit.threshold: 0.5 is not allowed; early_exit.macs_budget is given too; give only one of them",
        ),
        (
            {"name": "a", "training": {"precision": "fp64"}},
            "training.precision: fp64 is not allowed; DeepSpeed cannot reduce float64; set training.engine: torch",
        ),
        (
            {"name": "a", "training": {"engine": "torch", "zero_stage": 1}},
            "training.zero_stage: 1 is not allowed; engine: torch knows only stage 0",
        ),
        (
            {"name": "a", "training": {"zero_stage": 2, "optimizer": {"name": "lamb"}}},
            "training.zero_stage: 2 is not allowed; training.optimizer.name: lamb scales its steps by whole tensors, "
            "which ZeRO cuts up; give 0",
        ),
        (
            {"name": "a", "data": {"progressive": {"start": 28, "until_epoch": 3}}},
            "data.progressive.start: 28 is not allowed; give less than data.resolution = 28",
        ),
        (
            {"name": "a", "data": {"progressive": {"start": 20, "from_epoch": 3, "until_epoch": 3}}},
            "data.progressive.until_epoch: 3 is not allowed; give more than data.progressive.from_epoch = 3",
        ),
        (
            {"name": "a", "data": {"progressive": {"start": 20, "until_epoch": 10}}},
            "data.progressive.until_epoch: 10 is not allowed; training.epochs = 10 leaves no epoch at the full "
            "resolution; give fewer",
        ),
        (
            {"name": "a", "data": {"progressive": {"start": 20}}},
            "data.progressive.until_epoch: missing; it must be given",
        ),
        (
            {"name": "a", "data": {"progressive": {"start": 20, "until_epoch": 3, "until": 10}}},
            "data.progressive.until: unknown key; allowed here: start, from_epoch, until_epoch; "
            "did you mean until_epoch?",
        ),
        (
            {"name": "a", "distillation": {"teacher": "resnet50"}},
            "distillation.weights: missing; it must be given",
        ),
        (
            {"name": "a", "distillation": {"teacher": "resnet50", "weights": "a.pth", "weight": 1.5}},
            "distillation.weight: 1.5 is not allowed; give a number from 0.0 to 1.0",
        ),
        (
            {"name": "a", "workers": {"min": 2}},
            "workers.min: 2 is not allowed; give workers.max too, or workers.count alone",
        ),
        (
            {"name": "a", "workers": {"max": 2}},
            "workers.max: 2 is not allowed; give workers.min too, or workers.count alone",
        ),
        (
            {"name": "a", "workers": {"min": 3, "max": 2}},
            "workers.min: 3 is not allowed; give at most workers.max = 2",
        ),
        ({}, "name: missing; it must be given"),
        (None, "configuration: None is not allowed; give a mapping of keys"),
        ({"name": "a", 3: 4}, "configuration: key 3 is not allowed; give text as keys"),
        ({"name": "a", "experts": {"options": {3: 4}}}, "experts.options: key 3 is not allowed; give text as keys"),
    ],
)
def test_fields_that_do_not_fit_together(content: Any, message: str) -> None:
    assert refusal(content) == message


def test_one_expert_per_sample_is_allowed_without_selection_and_generalists() -> None:
    router = {"generalist_weight": 0, "selection": "frozen"}
    assert parse_config({"name": "a", "experts": {"per_sample": 1}, "router": router}).experts_per_sample == 1


@pytest.mark.parametrize(
    ("field", "neighbour", "close"),
    [
        ("trainin", "training", "; did you mean training?"),
        ("training.epoch", "epochs", "; did you mean epochs?"),
        ("training.optimizer.lr", "learning_rate", ""),
    ],
)
def test_an_unknown_key_names_those_that_exist(field: str, neighbour: str, close: str) -> None:
    message = refusal(tree(field, 3))
    assert message.startswith(f"{field}: unknown key; allowed here: ")
    assert neighbour in message.removesuffix(close).split(": ")[-1].split(", ")
    assert message.endswith(close)
    assert bool(close) == ("did you mean" in message)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    cases: list[tuple[bytes | None, str]] = [
        (None, "no such configuration file"),
        (b"name: [a", "not valid YAML"),
        (b"name: a\n\tseed: 1", "not valid YAML"),
        (b"- a\n- b", "the top level must be a mapping"),
        (b"name: ${nowhere}", "nowhere"),
        (b"name: \xff", "codec"),
    ]
    for content, words in cases:
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(InputError, match=words) as caught:
            load_config(file)
        assert str(caught.value).startswith(str(file))
        assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(InputError, match="no such configuration file"):
        load_config(tmp_path)  # a folder
    file.write_text("")
    with pytest.raises(InputError, match="name: missing"):
        load_config(file)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("experts=[1]", "experts: [1] is not allowed; give a mapping of keys"),
        ("workers=[2]", "workers: [2] is not allowed; give a mapping of keys"),
        ("data.folder.x=1", "data.folder: {'x': 1} is not allowed; give text"),
        ("training.epochs=???", "training.epochs: '???' is not allowed; give a whole number from 0 to 100000"),
    ],
)
def test_an_override_of_another_shape_is_refused_like_any_value(tmp_path: Path, override: str, message: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("name: shapes\nexperts: {count: 4}\ntraining: {epochs: 2}\n")
    with pytest.raises(InputError) as caught:
        load_config(file, [override])
    assert str(caught.value) == message


def test_overrides(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("name: a\ntraining: {epochs: 2, optimizer: {learning_rate: 1e-3}}\n")
    config = load_config(
        file, ["training.epochs=3", "training.optimizer.weight_decay=1e-4", "data.limit=null", "seed=7"]
    )
    assert (config.training.epochs, config.training.optimizer.weight_decay, config.seed) == (3, 1e-4, 7)
    assert config.training.optimizer.learning_rate == 1e-3
    for override in ("training", "--epochs=3", "=3", "training.epochs 3"):
        with pytest.raises(InputError, match="write key=value") as caught:
            load_config(file, [override])
        assert repr(override) in str(caught.value)
    for override, words in (("training=3", "training"), ("training.epochs=many", "training.epochs: 'many'")):
        with pytest.raises(InputError, match=words) as caught:
            load_config(file, [override])
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_the_configurations_in_the_repository(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    stored = tmp_path / "config.yaml"
    stored.write_text(config.to_yaml())
    assert load_config(stored) == config
    assert load_config(stored).digest() == config.digest()


@given(
    experts=st.integers(2, 64),
    rate=st.floats(1e-12, 1e6),
    options=st.dictionaries(
        st.from_regex(r"[a-z]{1,8}", fullmatch=True),
        st.one_of(
            st.integers(-9, 9), st.floats(-1e9, 1e9), st.booleans(), st.lists(st.integers(-9, 9)), st.text("a1.:#-")
        ),
        max_size=3,
    ),
    uri=st.none() | st.just("http://127.0.0.1:5000") | st.just("null") | st.just("1e3"),
)
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory, experts: int, rate: float, options: dict[str, Any], uri: str | None
) -> None:
    config = parse_config(
        {
            "name": "1e3",
            "experts": {"count": experts, "options": options},
            "training": {"optimizer": {"learning_rate": rate}},
            "tracking": {"uri": uri},
        }
    )
    stored = tmp_path_factory.getbasetemp() / "round-trip.yaml"
    stored.write_text(config.to_yaml())
    assert load_config(stored) == config
    job = Job(task="train", config=config, run_dir="/runs/a")
    assert Job.model_validate_json(job.model_dump_json()) == job


def test_a_configuration_cannot_be_changed() -> None:
    config: RunConfig = parse_config({"name": "a"})
    with pytest.raises(ValueError, match="frozen"):
        config.training.epochs = 3  # type: ignore[misc]
