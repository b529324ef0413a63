"""What each process of the exchange's benchmark does: `python -m coe_dist.bench.exchange_rank FOLDER`, see ranks.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import nn

from coe_dist.allocator import keep_freed_memory
from coe_dist.bench.exchange_peers import DeepSpeedExchange
from coe_dist.bench.exchange_work import CLASSES, OurExchange, PlainExpert, SentBytes, Way, Work
from coe_dist.bench.ranks import alternate, serve, summary
from coe_dist.bench.record import Record
from coe_dist.parallel.groups import create_groups

TOLERANCE = 1e-4  # of losses and gradients, relative to the largest value of the tensor


def measure(request: Record) -> Record:
    """One answer per case of request["cases"], {"experts", "samples", "load", "image": [C,H,W]}."""
    keep_freed_memory()  # as in training
    return {"answers": [_case(**case, repeats=request["repeats"]) for case in request["cases"]]}


def _case(*, experts: int, samples: int, load: str, image: list[int], repeats: int) -> Record:
    shape = tuple(image)

    def build(expert: int) -> nn.Module:
        return PlainExpert(shape[0], seed=expert)

    ways: dict[str, Way] = {
        "ours": OurExchange(create_groups(experts, timeout_seconds=60), build),
        "deepspeed_moe": DeepSpeedExchange(experts, shape, build, favourable=False),
        "deepspeed_parts": DeepSpeedExchange(experts, shape, build, favourable=True),
    }
    torch.set_num_threads(1)  # DeepSpeed changes it
    work = make_work(experts, samples, load, shape)
    equal = _equal(ways, work)
    sent = {name: _sent(way, work) for name, way in ways.items()}
    remote = make_work(experts, samples, "remote", shape)
    sent_remote = {name: _sent(way, remote) for name, way in ways.items()}
    works = {name: partial(_step, way, work) for name, way in ways.items()}
    alternate(works, 2)  # warm up
    answers = {}
    for name, taken in alternate(works, repeats).items():
        answers[name] = summary(taken) | {
            "bytes_per_pair": sent_remote[name][0] / samples,
            "bytes_back_per_pair": sum(sent_remote[name][1:]) / samples,
            "bytes_sent": sum(sent[name]),
        }
    answers["ours"] |= {"equal": equal}
    return {"ours": answers.pop("ours"), "peers": answers}


def make_work(experts: int, samples: int, load: str, shape: tuple[int, ...]) -> Work:
    """This rank's part.

    balanced: every expert gets N/E images, as many from each rank (the kindest case for a padded exchange); shuffled:
    N/E images, from wherever they are, as a router gives them; one: all N go to expert 0; remote: balanced, but over
    the experts of the next rank only.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    rows = samples // world_size
    everyone = torch.Generator().manual_seed(0)
    mine = torch.Generator().manual_seed(rank + 1)
    images = torch.randint(0, 256, (rows, *shape), generator=mine, dtype=torch.uint8)
    hosted = experts // world_size
    choose: dict[str, Callable[[], torch.Tensor]] = {
        "balanced": lambda: (torch.arange(rows) % experts)[torch.randperm(rows, generator=mine)],
        "shuffled": lambda: (torch.arange(samples) % experts)[torch.randperm(samples, generator=everyone)][
            rank * rows : (rank + 1) * rows
        ],
        "one": lambda: torch.zeros(rows, dtype=torch.int64),
        "remote": lambda: (rank + 1) % world_size * hosted + torch.arange(rows) % hosted,
    }
    labels = torch.randint(0, CLASSES, (rows,), generator=mine)
    return Work(images, images.float(), labels, choose[load](), samples)


def _step(way: Way, work: Work) -> torch.Tensor:
    for network in way.networks.values():
        network.zero_grad(set_to_none=True)
    return way(work)


def _sent(way: Way, work: Work) -> list[int]:
    """Bytes over all ranks of each all-to-all of the job, in order."""
    counter = SentBytes()
    with counter.counting():
        _step(way, work)
    each = torch.tensor(counter.each)
    dist.all_reduce(each)
    sent: list[int] = each.tolist()
    return sent


def _equal(ways: dict[str, Way], work: Work) -> bool:
    """Whether all ways give the same losses and gradients, on all ranks."""
    results = {}
    for name, way in ways.items():
        losses_B = _step(way, work)
        gradients = [
            torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for expert in sorted(way.networks)
            for parameter in way.networks[expert].parameters()
        ]
        results[name] = [losses_B, *gradients]
    same = all(
        _close(ours, peer) for name in results for ours, peer in zip(results["ours"], results[name], strict=True)
    )
    flag = torch.tensor(int(same))
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag)


def _close(ours: torch.Tensor, peer: torch.Tensor) -> bool:
    return float((ours - peer).detach().abs().max()) <= TOLERANCE * float(ours.detach().abs().max())


if __name__ == "__main__":
    serve(measure)
