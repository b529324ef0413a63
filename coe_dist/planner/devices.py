"""Tabulated rates: published peaks of common devices, and OUR assumptions about what small networks reach of them.

Peaks are the makers' data sheets: dense matrix FLOP/s (two per MAC), memory, memory bandwidth, links inside a machine.
The rest is assumed:

- A network takes the longest of three times: computing (COMPUTE of the peak), moving memory (BANDWIDTH of its peak),
  launching its operations one by one (LAUNCH seconds each). Small convolutional networks are bound by the second or
  third: they reach 2 to 10% of the peak FLOP/s, large ResNets 40%. BANDWIDTH was chosen on training throughputs that
  timm publishes for an RTX 3090 (results/benchmark-train-amp-nhwc-pt112-cu113-rtx3090.csv): six networks from tinynet_e
  to resnet50 are within 25%, and so are six others; those with grouped convolutions (RegNets) or CondConv are up to 1.5
  times slower than predicted. For the other devices the same fractions are assumed.
- Optimizer, router, loader and collectives: the constants below.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from coe_dist.config import RunConfig
from coe_dist.errors import InputError
from coe_dist.planner.facts import ForwardFacts, NetworkFacts
from coe_dist.planner.rates import Cost, Link, Rates, RouterRates

COMPUTE, BANDWIDTH = 0.5, 0.46  # of the peaks
LAUNCH = 8e-6  # seconds of the host for one operation, forward or backward
STEP_LAUNCHES = 40  # operations of an optimizer step: norm, clipping, update of the two parameter groups, engine
STEP_TRAFFIC = 7  # times the parameters' bytes that an optimizer step reads and writes
AVERAGE_LAUNCHES, AVERAGE_TRAFFIC = 10, 3  # the same of a moving average of the weights
ROUTER_ASSIGN = 1.5e-8  # seconds for each image and expert, on one core
ROUTER_LABELS = 4e-7  # seconds for each pair
ROUTER_PLAN = 1.2e-7  # seconds for each pair
ROUTER_PLAN_PEER = 3e-5  # seconds for each rank
COPY = 0.4  # of the memory bandwidth that gathering images reaches
# of one core, to read an image of at most 500 pixels a side, half of them JPEG: to decode and crop it, and more for
# each pixel of the result, once for resizing and once for each random operation. About 1,500 images/s at 176 pixels
# without operations (`bench loader`); from 64 to 288 pixels, with none and with two, measured times are within 8%.
IMAGE_SECONDS, PIXEL_SECONDS = 0.8 / 1500, 3.5e-9
RAW_SECONDS = 1 / 40_000  # to copy a small raw image
NETWORK = {True: 25e9, False: 1.25e9}  # bytes per second of a GPU (200 Gbit/s), of a CPU worker, between machines
NETWORK_LATENCY = 1e-5


@dataclass(frozen=True)
class Device:
    flops: dict[str, float]  # dense, by precision
    memory_bytes: float
    memory_bytes_per_second: float
    link_bytes_per_second: float  # inside a machine, one direction
    per_node: int
    cores_per_worker: float
    framework_bytes: float  # libraries and context (assumed)
    launch: float = LAUNCH


def _gpu(fp32: float, bf16: float, fp64: float, gigabytes: float, bandwidth: float, link: float, node: int) -> Device:
    flops = {"fp32": fp32 * 1e12, "bf16": bf16 * 1e12, "fp64": fp64 * 1e12}
    return Device(flops, gigabytes * 1e9, bandwidth * 1e9, link * 1e9, node, 12, 1.5e9)


DEVICES = {
    # TFLOP/s (fp32 is without TF32, which torch leaves off for matrices), GB, GB/s, GB/s of the link, GPUs a machine
    "h100": _gpu(67, 989, 67, 80, 3350, 450, 8),
    "h200": _gpu(67, 989, 67, 141, 4800, 450, 8),
    "a100": _gpu(19.5, 312, 19.5, 80, 2039, 300, 8),
    "v100": _gpu(15.7, 125, 7.8, 32, 900, 150, 8),
    "l4": _gpu(30.3, 121, 0.47, 24, 300, 32, 8),
    "rtx3090": _gpu(35.6, 71, 0.56, 24, 936, 32, 8),
    # one core of a server with 256-bit vectors at 3 GHz; 16 workers share a machine
    "cpu": Device({"fp32": 96e9, "bf16": 96e9, "fp64": 48e9}, 4e9, 1e10, 2e9, 16, 1, 0.7e9, 2e-6),
}
_UNITS = {"kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12}


def find_device(name: str) -> Device:
    """Raises InputError naming the known devices."""
    if name not in DEVICES:
        raise InputError(f"--gpu: {name!r} is not allowed; give {', '.join(DEVICES)} or measure")
    return DEVICES[name]


def default_network(device: str) -> float:
    """Bytes per second of one worker between machines, each way, where none is given (assumed)."""
    return NETWORK[device not in ("cpu", "here")]


def parse_bandwidth(text: str) -> float:
    """Bytes per second of '25GB/s', '200Gbit/s' or '200Gbps'. A lone Gb is refused: bits or bytes is a guess."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKMGT])(B/s|bit/s|bps)", text.strip())
    if not found or float(found[1]) <= 0:
        raise InputError(f"--network: {text!r} is not allowed; give for instance 25GB/s or 200Gbit/s")
    bits = found[3] != "B/s"
    return float(found[1]) * _UNITS[f"{found[2].lower()}b"] / (8 if bits else 1)


def tabulated(
    name: str,
    config: RunConfig,
    delegator: NetworkFacts,
    expert: NetworkFacts,
    teacher: ForwardFacts | None = None,
    *,
    network: float | None,
    per_node: int | None,
) -> Rates:
    """Rates of a device for the networks of `config`, counted for images of its data.resolution; `network` in bytes per
    second of one worker between machines."""
    device = find_device(name)
    experts, k = config.experts.count, config.experts_per_sample
    return Rates(
        source=f"tabulated: {name}",
        device=name,
        delegator=_training_cost(device, delegator, config),
        expert=_training_cost(device, expert, config),
        delegator_step=_step_seconds(device, delegator, config),
        expert_step=_step_seconds(device, expert, config),
        router=RouterRates(
            assign=Cost(2e-4, ROUTER_ASSIGN * experts),
            labels=Cost(2e-4, ROUTER_LABELS * k),
            plan=Cost(2e-4, ROUTER_PLAN * k),
            plan_peer=ROUTER_PLAN_PEER,
        ),
        inside=Link(NETWORK_LATENCY, device.link_bytes_per_second),
        inside_sums=Link(NETWORK_LATENCY, device.link_bytes_per_second),
        between=Link(NETWORK_LATENCY, network or default_network(name)),
        copy_bytes_per_second=device.memory_bytes_per_second * COPY,
        small_operation=device.launch,
        loader_seconds_per_image=loader_seconds(config),
        cores_per_worker=device.cores_per_worker,
        memory_bytes=device.memory_bytes,
        framework_bytes=device.framework_bytes,
        per_node=per_node or device.per_node,
        teacher=None if teacher is None else _cost(device, teacher.macs, teacher, config),
    )


def _training_cost(device: Device, facts: NetworkFacts, config: RunConfig) -> Cost:
    return _cost(device, facts.training_macs, facts, config)


def _cost(device: Device, macs: float, facts: NetworkFacts | ForwardFacts, config: RunConfig) -> Cost:
    """Of one image: `macs`, and the operations and the traffic of `facts`."""
    threads = config.workers.threads if device.cores_per_worker == 1 else 1
    computing = 2 * macs / (device.flops[config.training.precision] * COMPUTE * threads)
    moving = facts.traffic_bytes_per_image / (device.memory_bytes_per_second * BANDWIDTH * threads)
    return Cost(0.0, max(computing, moving), floor=facts.operations * device.launch)


def loader_seconds(config: RunConfig) -> float:
    """Of one core for an image of data.resolution; a small one saves little, it is decoded all the same."""
    if config.data.source == "fashion-mnist":
        return RAW_SECONDS
    return IMAGE_SECONDS + PIXEL_SECONDS * config.data.resolution**2 * (1 + config.data.augmentation.operations)


def _step_seconds(device: Device, facts: NetworkFacts, config: RunConfig) -> float:
    launches, passes = STEP_LAUNCHES, STEP_TRAFFIC
    if config.training.ema_decay is not None:
        launches, passes = launches + AVERAGE_LAUNCHES, passes + AVERAGE_TRAFFIC
    traffic = passes * facts.parameters * (8 if config.training.precision == "fp64" else 4)
    return launches * device.launch + traffic / (device.memory_bytes_per_second * BANDWIDTH)
