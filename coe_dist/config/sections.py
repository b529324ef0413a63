"""The sections of the configuration: what can be set, each field's bounds and default."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Finite = Annotated[float, Field(allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


class Section(BaseModel):
    """Base of all sections: immutable, unknown keys are errors, and nothing is converted (true is not 1, "3" not 3)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


Options = dict[str, int | Finite | str | bool | list[int]]


class NetworkConfig(Section):
    """A network by registry name. `options` go to its constructor (see coe/backbones.py)."""

    network: str = "small_cnn"
    options: Options = Field(default_factory=dict)


class PretrainableConfig(NetworkConfig):
    initial_weights: str | None = None  # file to start from (training/initial_weights.py); none: random weights


class ExpertsConfig(PretrainableConfig):
    count: Annotated[int, Field(ge=2, le=4096)] = 4
    per_sample: Annotated[int, Field(ge=1, le=4096)] | None = None  # k; none means every expert (dense)
    share: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0  # of a batch: the images the delegator is least sure of
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


class StagingConfig(Section):
    """Copies of the .beton files on each machine's own disk (storage/staging.py): of a URL's always, of a path's where
    `folder` is given."""

    folder: str | None = None  # none: staged/ in $XDG_CACHE_HOME/coe_dist
    keep_gigabytes: Positive = 200.0  # before a copy, the least recently used that nobody reads make room within it


class DataConfig(Section):
    source: Literal["fashion-mnist", "imagefolder"] = "fashion-mnist"
    # a path, or a URL such as s3://bucket/images; holds train, validation, test.beton and their .json side-cars
    folder: str = "data/fashion-mnist"
    staging: StagingConfig = StagingConfig()
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
    epochs: Annotated[int, Field(ge=0, le=100_000)] = 10  # 0: the networks answer as they start (initial_weights)
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
    wait_minutes: Annotated[float, Field(gt=0, le=10_080)] | None = None  # for machines a cluster has yet to start

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


class StorageConfig(Section):
    """Where the run folder is mirrored to while it trains (storage/mirror.py)."""

    url: str | None = None  # such as s3://bucket/runs, which gets one folder for each run


class DistillationConfig(Section):
    """Experts, and single networks, learn from a teacher's largest logits as well (coe/distillation.py)."""

    teacher: str  # a timm classifier by name; its classes must stand in the order of the data's
    options: Options | None = None  # where given, also {}: with `teacher` a network as in `experts`, trained here
    weights: str  # file with its state dict (.safetensors, or .pth and the like); nothing is downloaded
    resolution: Annotated[int, Field(ge=8, le=1024)] | None = None  # side of its images; none: as the loader gives them
    temperature: Positive = 2.0
    weight: Fraction = 0.5  # of the distillation loss; the rest is that of cross-entropy
    top: Annotated[int, Field(ge=1, le=1024)] = 32  # logits that travel with an image, 4 bytes each
    delegator: bool = False  # the delegator's rough prediction learns from the teacher too
