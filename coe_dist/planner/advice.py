"""One line: what holds the step up and which change would help most, by planning the run anew with each change."""

from __future__ import annotations

from coe_dist.planner.memory import Memory
from coe_dist.planner.run import LARGEST_WORLD, Run

_WORTH = 1.05  # a smaller gain is not worth a change
_WORTH_WORKERS = 1.2  # nor are more workers where a setting gives nearly as much


def advise(run: Run, gpus: int, bottleneck: str, memory: Memory, fits: bool) -> str:
    """Names the largest part of the step and the change that gives the most images/s; or what does not fit."""
    if not fits:
        parts = {name: value for name, value in vars(memory).items() if name != "framework"}
        largest = max(parts, key=parts.__getitem__)
        change = (
            "more workers or a smaller training.global_batch (or training.accumulation)"
            if largest in ("activations", "images")
            else "more workers, so that each hosts fewer experts, or training.zero_stage"
        )
        return (
            f"a worker would need {memory.total / 1e9:.1f} GB and has {run.rates.memory_bytes / 1e9:.1f} GB; "
            f"most of it is {largest} ({parts[largest] / 1e9:.1f} GB): {change}"
        )
    step = run.step(gpus)
    share = step.parts[bottleneck] / step.seconds
    now = run.images_per_second(gpus)
    gains = {text: speed / now for text, speed in _changes(run, gpus).items()}
    what = f"{bottleneck} {'are' if bottleneck == 'experts' else 'is'} {share:.0%} of the step"
    best = max(gains, key=lambda text: gains[text] / (_WORTH_WORKERS if "workers in place" in text else 1.0))
    if gains[best] < _WORTH:
        return f"{what}; no single change of those planned gives 5% more images/s"
    return f"{what}; {best} would give {gains[best]:.2f} times the images/s"


def _changes(run: Run, gpus: int) -> dict[str, float]:
    """Images/s after each change that is open to this run."""
    config, speeds = run.config, {}
    if config.experts_per_sample > 2:
        speeds["experts.per_sample=2"] = run.with_changes(experts={"per_sample": 2}).images_per_second(gpus)
    batch = 2 * config.training.global_batch
    if batch <= run.train_images:
        changed = run.with_changes(training={"global_batch": batch})
        speeds[f"training.global_batch={batch}"] = changed.images_per_second(gpus)
    if config.router.scope == "global" and gpus > 1 and config.router.where == "replicated":
        speeds["router.scope=local"] = run.with_changes(router={"scope": "local"}).images_per_second(gpus)
    threads = 2 * config.data.loader_threads
    changed = run.with_changes(data={"loader_threads": threads})
    speeds[f"data.loader_threads={threads}"] = changed.images_per_second(gpus)
    more = 2 * gpus
    faster = run.images_per_second(more)
    if faster > 1.5 * run.images_per_second(gpus) and more <= LARGEST_WORLD:
        speeds[f"{more} workers in place of {gpus}"] = faster
    return speeds
