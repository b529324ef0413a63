"""After warm_up nothing of the transportation solver is left to compile, nor of the piecewise linear units."""

import json
import subprocess
import sys

CODE = """
import json
import numpy as np
from coe_dist.coe import transport_core, transport_exchange
from coe_dist.coe.transport import balanced_assignment, balanced_assignment_sparse
from coe_dist.coe.warm_up import warm_up

def versions():
    modules = (transport_core, transport_exchange)
    return {
        f"{module.__name__}.{name}": len(thing.signatures)
        for module in modules for name, thing in vars(module).items() if hasattr(thing, "signatures")
    }

warm_up()
before = versions()
generator = np.random.default_rng(1)
for samples, experts in ((0, 3), (7, 3), (700, 5), (3000, 6)):
    ids_N = generator.permutation(samples)
    edges_Nk = np.stack([ids_N % experts, (ids_N + 1) % experts], 1)
    for dtype in (np.float32, np.float64):
        for scores_NE in (generator.standard_normal((samples, experts)), generator.integers(0, 2, (samples, experts))):
            scores_NE = scores_NE.astype(dtype)
            solved = balanced_assignment(scores_NE, ids_N)
            balanced_assignment(scores_NE, ids_N, warm_prices_E=solved.prices_E)
            scores_Nk = np.take_along_axis(scores_NE, edges_Nk, 1)
            balanced_assignment_sparse(scores_Nk, edges_Nk, experts, ids_N, feasible_N=edges_Nk[:, 0])
print(json.dumps([before, versions()]))
"""


def test_nothing_is_compiled_after_warm_up() -> None:
    """In a process of its own: in this one other tests may have compiled anything."""
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=300, check=True)
    before, after = json.loads(done.stdout)
    for name in ("transport_core.sample_mask", "transport_core.tied_rows", "transport_exchange.repair"):
        assert before[f"coe_dist.coe.{name}"], f"{name} was not reached"
    assert after == before


PWLU_CODE = """
import json
import torch
from coe_dist.coe import pwlu_kernels, pwlu_loops
from coe_dist.coe.pwlu import PWLU, realign
from coe_dist.coe.warm_up import warm_up_pwlu

def versions():
    return {
        f"{module.__name__}.{name}": len(thing.signatures)
        for module in (pwlu_kernels, pwlu_loops)
        for name, thing in vars(module).items() if hasattr(thing, "signatures")
    }

torch.set_num_threads(3)
warm_up_pwlu()
assert torch.get_num_threads() == 3
before = versions()
for channels, layout, threads, side in (
    (4, torch.contiguous_format, 1, 5), (4, torch.channels_last, 2, 300), (None, torch.channels_last, 1, 5)
):
    torch.set_num_threads(threads)
    unit = PWLU(channels)
    realign(unit)
    for dtype in (torch.float32, torch.bfloat16):
        images = torch.randn(2, 4, side, side, dtype=dtype).to(memory_format=layout).requires_grad_()
        unit(images).sum().backward()
        unit(images[:0]).sum().backward()
        unit(images[..., ::2]).sum().backward()
        unit(images.mean((2, 3))).sum().backward()
print(json.dumps([before, versions()]))
"""


def test_no_piecewise_linear_unit_is_compiled_after_warm_up() -> None:
    done = subprocess.run([sys.executable, "-c", PWLU_CODE], capture_output=True, text=True, timeout=300, check=True)
    before, after = json.loads(done.stdout)
    assert before["coe_dist.coe.pwlu_loops.forward"] > 0 < before["coe_dist.coe.pwlu_kernels._differentiate_alone"]
    assert after == before
