"""The one configuration schema: YAML plus dotted overrides -> a frozen, fully validated RunConfig.

Every problem is an InputError of one line: `experts.count: 0 is not allowed; give a whole number from 2 to 4096`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from coe_dist.errors import InputError

Finite = Annotated[float, Field(allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


class Section(BaseModel):
    """Base of all sections: immutable, unknown keys are errors, and nothing is converted (true is not 1, "3" not 3)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class NetworkConfig(Section):
    """A network by registry name. `options` go to its constructor (see coe/backbones.py)."""

    network: str = "small_cnn"
    options: dict[str, int | Finite | str | bool | list[int]] = Field(default_factory=dict)


class PretrainableConfig(NetworkConfig):
    initial_weights: str | None = None  # file to start from (training/initial_weights.py); none: random weights


class ExpertsConfig(PretrainableConfig):
    count: Annotated[int, Field(ge=2, le=4096)] = 4
    per_sample: Annotated[int, Field(ge=1, le=4096)] | None = None  # k; none means every expert (dense)
    initial_noise: Annotated[float, Field(ge=0.0, le=1.0)] = 0.01  # on initial_weights, times each tensor's size


class AugmentationConfig(Section):
    """Training-time augmentation; its parameters are a function of (seed, epoch, sample id) alone."""

    flip: bool = True
    shift: Annotated[int, Field(ge=0, le=64)] = 2  # pixels, each direction, zero fill
    random_resized_crop: bool = False  # scale 0.35..1, ratio 3/4..4/3, to `data.resolution`
    operations: Annotated[int, Field(ge=0, le=5)] = 0  # random changes of colour or shape (data/random_operations.py)
    magnitude: Annotated[float, Field(ge=0.0, le=10.0, allow_inf_nan=False)] = 9.0  # their largest strength
    erase: Fraction = 0.0  # probability that a random rectangle becomes grey


class ProgressiveConfig(Section):
    """Training images grow from `start` to `data.resolution` pixels a side between two epochs (data/progressive.py)."""

    start: Annotated[int, Field(ge=8, le=1024)]
    from_epoch: Annotated[int, Field(ge=0)] = 0
    until_epoch: Annotated[int, Field(ge=1)]  # the first epoch (from 0) at the full resolution


class DataConfig(Section):
    source: Literal["fashion-mnist", "imagefolder"] = "fashion-mnist"
    folder: str = "data/fashion-mnist"  # holds train.beton, validation.beton, test.beton and their .json side-cars
    resolution: Annotated[int, Field(ge=8, le=1024)] = 28  # side in pixels of the square that reaches the networks
    progressive: ProgressiveConfig | None = None
    augmentation: AugmentationConfig = AugmentationConfig()
    loader: Literal["ffcv", "torchvision"] = "ffcv"  # torchvision: slower, reads the same files without FFCV
    loader_threads: Annotated[int, Field(ge=1, le=256)] = 1
    limit: Annotated[int, Field(ge=1)] | None = None  # use only the first so many images of each split (tests)


class RouterConfig(Section):
    where: Literal["replicated", "rank0", "process"] = "replicated"
    scope: Literal["global", "local"] = "global"
    generalist_weight: Fraction = 0.2  # lambda of the weight generation module: 1 plain ensemble, 0 hard partition
    labels: Literal["balanced", "best", "soft", "competence"] = "balanced"  # label generation module
    label_temperature: Positive = 1.0
    variance: bool = True  # variance calculation module
    selection_weight: NonNegative = 1.0  # beta in the delegator's loss
    selection: Literal["learned", "frozen"] = "learned"


class OptimizerConfig(Section):
    name: Literal["sgd", "adamw", "rmsprop", "lamb"] = "sgd"
    learning_rate: Positive = 0.1
    momentum: Fraction = 0.9  # of sgd and rmsprop
    nesterov: bool = True
    weight_decay: NonNegative = 5e-4  # not applied to norms, biases and activations' own parameters
    warmup_epochs: NonNegative = 0.5
    schedule: Literal["cosine", "constant"] = "cosine"
    expert_learning_rate: Positive | None = None  # none: the same as learning_rate


class TrainingConfig(Section):
    epochs: Annotated[int, Field(ge=1, le=100_000)] = 10
    global_batch: Annotated[int, Field(ge=1, le=1_048_576)] = 256  # images per optimizer step over all ranks
    accumulation: Annotated[int, Field(ge=1, le=1024)] = 1  # micro-batches per optimizer step
    optimizer: OptimizerConfig = OptimizerConfig()
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    clip_norm: Positive | None = None  # per network, on the true global norm
    precision: Literal["fp32", "bf16", "fp64"] = "fp32"
    batchnorm: Literal["local", "group"] = "local"
    engine: Literal["deepspeed", "torch"] = "deepspeed"
    deterministic: bool = False  # torch's deterministic algorithms: a resumed run is bit-equal on GPUs too, but slower
    zero_stage: Annotated[int, Field(ge=0, le=2)] = 0
    non_finite: Literal["stop", "skip"] = "stop"  # what a non-finite loss or gradient does
    timeout_seconds: Annotated[float, Field(ge=5, le=86_400)] = 600.0  # of every collective
    evaluate_every: Annotated[int, Field(ge=1)] = 1  # epochs
    checkpoint_every: Annotated[int, Field(ge=1)] = 1  # epochs
    checkpoint_every_steps: Annotated[int, Field(ge=1)] | None = None  # also every so many optimizer steps
    keep_checkpoints: Annotated[int, Field(ge=1)] = 2  # the newest; the one with the best validation stays besides
    ema_decay: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None  # exponential moving average of the weights
    pwlu_statistics_epochs: Annotated[int, Field(ge=1)] = 5  # of activation: pwlu, before it is learned (the paper's 5)


class EarlyExitConfig(Section):
    """How an image is answered at inference. Give a budget, a threshold, or neither (then no image exits early)."""

    macs_budget: Positive | None = None  # average multiply-adds per image; the threshold is calibrated on validation
    threshold: Fraction | None = None
    final: Literal["expert", "average"] = "expert"


class WorkersConfig(Section):
    count: Annotated[int, Field(ge=1, le=65_536)] = 2
    min: Annotated[int, Field(ge=1, le=65_536)] | None = None  # with max, in place of count: elastic
    max: Annotated[int, Field(ge=1, le=65_536)] | None = None
    oversubscribe: bool = False
    device: Literal["auto", "cpu", "gpu"] = "auto"
    threads: Annotated[int, Field(ge=1, le=1024)] = 1  # torch's threads per worker
    max_failures: Annotated[int, Field(ge=0)] = 0  # restarts from the newest checkpoint after a worker's death

    @property
    def elastic(self) -> bool:
        return self.min is not None

    @property
    def fewest(self) -> int:
        return self.count if self.min is None else self.min

    @property
    def most(self) -> int:
        return self.count if self.max is None else self.max


class TrackingConfig(Section):
    enabled: bool = True
    uri: str | None = None  # none: MLFLOW_TRACKING_URI, else one sqlite file beside the run folders
    experiment: str = "coe_dist"
    every_steps: Annotated[int, Field(ge=1)] = 20


class DistillationConfig(Section):
    """Experts learn from a teacher's largest logits as well (coe/distillation.py)."""

    teacher: str  # a timm classifier by name; its classes must stand in the order of the data's
    weights: str  # file with its state dict (.safetensors, or .pth and the like); nothing is downloaded
    resolution: Annotated[int, Field(ge=8, le=1024)] | None = None  # side of its images; none: as the loader gives them
    temperature: Positive = 2.0
    weight: Fraction = 0.5  # of the distillation loss; the rest is that of cross-entropy
    top: Annotated[int, Field(ge=1, le=1024)] = 32  # logits that travel with an image, 4 bytes each
    delegator: bool = False  # the delegator's rough prediction learns from the teacher too


class RunConfig(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    runs_dir: str = "runs"
    data: DataConfig = DataConfig()
    delegator: PretrainableConfig = PretrainableConfig()
    experts: ExpertsConfig = ExpertsConfig()
    router: RouterConfig = RouterConfig()
    training: TrainingConfig = TrainingConfig()
    distillation: DistillationConfig | None = None
    early_exit: EarlyExitConfig = EarlyExitConfig()
    workers: WorkersConfig = WorkersConfig()
    tracking: TrackingConfig = TrackingConfig()

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir) / self.name

    @property
    def experts_per_sample(self) -> int:
        """k: how many experts see each training image."""
        return self.experts.count if self.experts.per_sample is None else self.experts.per_sample

    @property
    def micro_batch(self) -> int:
        """N: images per global micro-batch, the unit of routing, labels and BatchNorm."""
        return self.training.global_batch // self.training.accumulation

    @property
    def uses_pwlu(self) -> bool:
        """Whether a network has piecewise linear units (coe/pwlu.py)."""
        return any(section.options.get("activation") == "pwlu" for section in (self.delegator, self.experts))

    @model_validator(mode="after")
    def _cross_field_rules(self) -> RunConfig:
        count, k = self.experts.count, self.experts_per_sample
        if k > count:
            raise _refused("experts.per_sample", k, f"give a whole number from 1 to experts.count = {count}")
        if k == 1 and self.router.generalist_weight > 0:
            raise _refused(
                "experts.per_sample",
                k,
                f"router.generalist_weight = {self.router.generalist_weight} > 0 needs at least 2 experts per sample",
            )
        if k == 1 and self.router.selection != "frozen":
            raise _refused(
                "experts.per_sample",
                k,
                "it leaves selection without a signal; give 2 or more, or set router.selection: frozen",
            )
        if self.training.global_batch % self.training.accumulation:
            raise _refused(
                "training.accumulation",
                self.training.accumulation,
                f"it must divide training.global_batch = {self.training.global_batch}",
            )
        if self.early_exit.macs_budget is not None and self.early_exit.threshold is not None:
            raise _refused(
                "early_exit.threshold",
                self.early_exit.threshold,
                "early_exit.macs_budget is given too; give only one of them",
            )
        workers = self.workers
        if (workers.min is None) != (workers.max is None):
            given, other = ("min", "max") if workers.max is None else ("max", "min")
            raise _refused(
                f"workers.{given}", getattr(workers, given), f"give workers.{other} too, or workers.count alone"
            )
        if workers.min is not None and workers.max is not None and workers.min > workers.max:
            raise _refused("workers.min", workers.min, f"give at most workers.max = {workers.max}")
        if self.router.scope == "local" and self.router.where != "replicated":
            raise _refused(
                "router.where",
                self.router.where,
                "router.scope: local solves on every rank; give replicated",
            )
        self._check_progressive()
        if self.uses_pwlu and self.training.pwlu_statistics_epochs >= self.training.epochs:
            raise _refused(
                "training.pwlu_statistics_epochs",
                self.training.pwlu_statistics_epochs,
                f"training.epochs = {self.training.epochs} leaves no epoch in which activation: pwlu is learned; "
                "give fewer, or more epochs",
            )
        if self.training.engine == "torch" and self.training.zero_stage != 0:
            raise _refused("training.zero_stage", self.training.zero_stage, "engine: torch knows only stage 0")
        if self.training.optimizer.name == "lamb" and self.training.zero_stage > 0:
            raise _refused(
                "training.zero_stage",
                self.training.zero_stage,
                "training.optimizer.name: lamb scales its steps by whole tensors, which ZeRO cuts up; give 0",
            )
        if self.training.precision == "fp64" and self.training.engine != "torch":
            raise _refused("training.precision", "fp64", "DeepSpeed cannot reduce float64; set training.engine: torch")
        return self

    def _check_progressive(self) -> None:
        schedule = self.data.progressive
        if schedule is None:
            return
        if schedule.start >= self.data.resolution:
            raise _refused(
                "data.progressive.start", schedule.start, f"give less than data.resolution = {self.data.resolution}"
            )
        if schedule.until_epoch <= schedule.from_epoch:
            raise _refused(
                "data.progressive.until_epoch",
                schedule.until_epoch,
                f"give more than data.progressive.from_epoch = {schedule.from_epoch}",
            )
        if schedule.until_epoch >= self.training.epochs:
            raise _refused(
                "data.progressive.until_epoch",
                schedule.until_epoch,
                f"training.epochs = {self.training.epochs} leaves no epoch at the full resolution; give fewer",
            )

    def digest(self) -> str:
        """16 hex digits that identify this configuration (all fields, defaults included)."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_yaml(self) -> str:
        return str(OmegaConf.to_yaml(OmegaConf.create(self.model_dump(mode="json"))))


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a YAML file and applies overrides such as `training.epochs=3`.

    Raises InputError (one line) for a missing file, broken YAML, an unknown key or a value that is not allowed.
    """
    return parse_config(read_yaml(path, overrides))


def read_yaml(path: str | Path, overrides: Sequence[str] = ()) -> Any:
    """The file's content with the overrides, as plain dictionaries. Raises InputError as load_config does."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such configuration file")
    try:
        tree = OmegaConf.load(path)
        if not OmegaConf.is_dict(tree):
            raise InputError(f"{path}: the top level must be a mapping of keys such as `name`, `data`, `training`")
        for override in overrides:
            if not re.match(r"^[A-Za-z_][\w.]*=", override):
                raise InputError(
                    f"override {override!r} is not allowed; write key=value, for instance training.epochs=3"
                )
        tree = OmegaConf.merge(tree, OmegaConf.from_dotlist(list(overrides)))
        return OmegaConf.to_container(tree, resolve=True)
    except InputError:
        raise
    except (OmegaConfBaseException, OSError, ValueError) as error:
        raise InputError(f"{path}: {_first_line(error)}") from error
    except Exception as error:  # PyYAML's own error classes
        if type(error).__module__.startswith("yaml"):
            raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
        raise


def parse_config(content: Any) -> RunConfig:
    """Builds a RunConfig from plain dictionaries; InputError names the first field that is not allowed."""
    return parse(RunConfig, content)


Schema = TypeVar("Schema", bound=Section)


def parse(schema: type[Schema], content: Any) -> Schema:
    """The same for any schema made of Sections."""
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        raise InputError(describe(error, schema)) from None


class _RefusedError(ValueError):
    """A cross-field rule was broken; the message is already complete."""


def _refused(field: str, value: object, allowed: str) -> _RefusedError:
    return _RefusedError(f"{field}: {value} is not allowed; {allowed}")


def describe(error: ValidationError, schema: type[BaseModel] = RunConfig) -> str:
    """One line for the first problem pydantic found: field, value, what is allowed."""
    first = error.errors()[0]
    location, kind, value = first["loc"], first["type"], first["input"]
    context = first.get("ctx", {})
    if location[-1:] == ("[key]",) or kind == "invalid_key":
        where = ".".join(map(str, location[:-2])) or "configuration"
        return f"{where}: key {value!r} is not allowed; give text as keys"
    if "options" in location:
        location = location[: location.index("options") + 2]  # what follows names a member of the union of types
    field = ".".join(map(str, location)) or "configuration"
    if kind == "value_error":
        cause = context.get("error")
        return str(cause) if isinstance(cause, _RefusedError) else f"{field}: {cause}"
    if kind == "extra_forbidden":
        return f"{field}: unknown key; allowed here: {', '.join(_allowed_keys(schema, location))}"
    if kind == "missing":
        return f"{field}: missing; it must be given"
    return f"{field}: {value!r} is not allowed; give {_allowed(schema, location, kind, context, first['msg'])}"


def _allowed_keys(schema: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    section = schema
    for part in location[:-1]:
        if str(part) not in section.model_fields:  # a key of `dict[str, Section]`
            continue
        annotation = section.model_fields[str(part)].annotation
        # of `Section | None` and of `dict[str, Section]`
        for member in (annotation, *get_args(annotation)):
            if isinstance(member, type) and issubclass(member, BaseModel):
                section = member
                break
    return list(section.model_fields)


def _allowed(
    schema: type[BaseModel], location: tuple[int | str, ...], kind: str, context: dict[str, Any], message: str
) -> str:
    if kind == "literal_error":
        return str(context["expected"]).replace("'", "")
    if kind == "string_pattern_mismatch":
        more = re.search(r"\{0,(\d+)\}", str(context["pattern"]))  # than the first character
        longest = 1 + int(more[1]) if more else 1
        return f"up to {longest} letters, digits, '.', '_' or '-', starting with a letter or digit"
    if "options" in location[:-1]:
        return "a finite number, text, true or false, or a list of whole numbers"
    if kind in ("dict_type", "model_type"):
        return "a mapping of keys"
    bounds, whole = _bounds(schema, location)
    if bounds:
        return f"{'a whole number' if whole else 'a number'} {bounds}"
    return {"string_type": "text", "bool_type": "true or false"}.get(kind, message.removeprefix("Input should be "))


def _bounds(of: type[BaseModel], location: tuple[int | str, ...]) -> tuple[str, bool]:
    """The range that a numeric field's schema allows, in words, and whether it takes whole numbers."""
    schema: dict[str, Any] = of.model_json_schema()
    node: dict[str, Any] = schema
    for part in location:
        properties = node.get("properties", {})
        if str(part) not in properties:
            return "", False
        node = properties[str(part)]
        options = node.get("anyOf", [node])
        node = next((o for o in options if o.get("type") != "null"), node)
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rsplit("/", 1)[1]]
    low, high = node.get("minimum"), node.get("maximum")
    above, below = node.get("exclusiveMinimum"), node.get("exclusiveMaximum")
    start = f"from {low}" if low is not None else f"above {above}" if above is not None else ""
    end = f"to {high}" if high is not None else f"below {below}" if below is not None else ""
    if start.startswith("from") and not end:
        start = start.replace("from", "of at least", 1)
    return " ".join(part for part in (start, end) if part), node.get("type") == "integer"


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
