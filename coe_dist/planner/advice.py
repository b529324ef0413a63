"""One line: what holds the step up and which change would help most, by planning the run anew with each change."""

from __future__ import annotations

from coe_dist.planner.memory import Memory
from coe_dist.planner.run import LARGEST_WORLD, Run

_WORTH = 1.05  # a smaller gain is not worth a change


def advise(run: Run, gpus: int, bottleneck: str, memory: Memory, fits: bool) -> str:
    """Names what holds the step up, the setting that gives the most images/s, and what twice the workers give; or what
    does not fit."""
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
    step, now = run.step(gpus), run.images_per_second(gpus)
    if step.waits_for_loader:
        what = f"loader: the step is as long as decoding takes, all else takes {step.work / step.seconds:.0%} of it"
    else:
        share = step.parts[bottleneck] / step.seconds
        what = f"{bottleneck} {'are' if bottleneck == 'experts' else 'is'} {share:.0%} of the step"
    settings = _settings(run, gpus)
    changes = {best: settings[best] for best in [max(settings, key=settings.__getitem__)]}
    if 2 * gpus <= LARGEST_WORLD:
        changes[f"{2 * gpus} workers"] = run.images_per_second(2 * gpus)
    gains = [f"{text} would give {speed / now:.2f} times" for text, speed in changes.items() if speed > _WORTH * now]
    return f"{what}; {', '.join(gains)} the images/s" if gains else f"{what}; no change planned gives 5% more images/s"


def _settings(run: Run, gpus: int) -> dict[str, float]:
    """Images/s with each changed setting that is open to this run."""
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
    return speeds
