"""The GPU check: the parallel step on real devices, compared with the single-process reference on the CPU.

    python tests/gpu/check.py                one GPU: world size 1 on NCCL, 2 and 3 ranks sharing the GPU on gloo
    python tests/gpu/check.py --multi        several GPUs: one rank each, NCCL
    python tests/gpu/check.py --device cpu   the same program on the CPU, to keep it in order

A plain program, because a GPU machine may have nothing but torch, numpy and numba. Ends with `N passed, N failed`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

import reference  # noqa: E402
import torch  # noqa: E402
from ranks import run_ranks  # noqa: E402
from reference import Case  # noqa: E402

TOLERANCE = 1e-3  # other kernels than the CPU's, five steps apart; float32 throughout


def cases_of(world_size: int) -> list[Case]:
    return [
        Case(world_size, 4, 2),
        Case(world_size, 4, 4, batchnorm="group", clip_norm=0.5, accumulation=2),
        Case(world_size, 3, 2, batchnorm="group", where="rank0", labels="best"),
        Case(world_size, 2, 2, labels="soft"),
    ]


def run_on_device(folder: Path) -> None:
    """Runs on every rank (see ranks.py)."""
    import torch.distributed as dist
    from parallel.parity_cases import run

    kind = os.environ["COE_CHECK_DEVICE"]
    device = torch.device(kind)
    if kind == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        device = torch.device("cuda", dist.get_rank() % torch.cuda.device_count())
        torch.cuda.set_device(device)
    run(folder, device)


def check(world_size: int, backend: str, device: str) -> list[tuple[str, str]]:
    """(case, problem or '') for each case of one world size."""
    cases = cases_of(world_size)
    os.environ |= {"COE_CHECK_DEVICE": device, "COE_TEST_BACKEND": backend}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "cases.json").write_text(json.dumps([asdict(case) for case in cases]))
        for index, case in enumerate(cases):
            torch.save(reference.train(case), folder / f"{index}.pt")
        try:
            run_ranks(world_size, "gpu.check:run_on_device", folder)
        except AssertionError as error:
            return [(f"{backend}, {world_size} ranks", str(error))]
        worst = [json.loads((folder / f"errors-{rank}.json").read_text()) for rank in range(world_size)]
    results = []
    for index, case in enumerate(cases):
        error, where = max((rank[index] for rank in worst), key=lambda found: found[0])
        problem = "" if error <= TOLERANCE else f"{where}: error {error:.2e}"
        results.append((f"{device}, {backend}, {case.name}: {error:.1e}", problem))
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--multi", action="store_true", help="one rank per GPU, at least two GPUs")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("this machine has no usable GPU; --device cpu runs the same program on the CPU", file=sys.stderr)
        return 2
    if options.multi:
        gpus = torch.cuda.device_count()
        if gpus < 2:
            print(f"--multi: {gpus} GPU is not enough; give at least 2", file=sys.stderr)
            return 2
        plans = [(gpus, "nccl")]
    else:
        plans = [(1, "nccl" if options.device == "cuda" else "gloo"), (2, "gloo"), (3, "gloo")]
    results = [result for world_size, backend in plans for result in check(world_size, backend, options.device)]
    for case, problem in results:
        print("FAILED" if problem else "passed", case, problem)
    failed = sum(bool(problem) for _, problem in results)
    print(f"{len(results) - failed} passed, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
