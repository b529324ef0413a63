"""The two phases of piecewise linear units in training (see coe/pwlu.py).

For training.pwlu_statistics_epochs epochs the units are ReLUs and their inputs are tracked; from then on they are
learned. The running statistics move once an optimizer step, with the inputs of all replicas of a network (our own
rule): one all-reduce of three numbers a function, in these epochs only. So replicas hold equal statistics at any
moment, whoever saves them saves everybody's, and neither the number of workers nor when a run was stopped changes the
bounds that follow from them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from coe_dist.coe import pwlu
from coe_dist.training.ema import WeightAverage
from coe_dist.training.engines import NetworkEngine
from coe_dist.training.optim import activation_parameters


class PwluPhases:
    """Of the networks of this rank, some or all of which may have no such units, or learn them already."""

    def __init__(
        self, engines: Iterable[NetworkEngine], averages: Mapping[str, WeightAverage], statistics_epochs: int
    ) -> None:
        self._tracking = [engine for engine in engines if pwlu.tracking(engine.network)]
        self._averages, self._epochs = averages, statistics_epochs

    def end_step(self, *, done: bool) -> None:
        """After each optimizer step. done: False for one that was skipped, whose inputs are left out. Collective."""
        for engine in self._tracking:
            sums = pwlu.take_sums(engine.network)
            if done:
                pwlu.track(engine.network, engine.group.all_reduce_sum(sums))

    def begin_epoch(self, epoch: int) -> bool:
        """Before each epoch; says whether units of this rank begin to learn with it.

        The optimizer's state of their parameters starts anew: AdamW's count of the steps in which they rested would
        make their first steps up to six times too long. All else of the optimizer stays.
        """
        if epoch < self._epochs or not self._tracking:
            return False
        for engine in self._tracking:
            pwlu.realign(engine.network)
            if engine.name in self._averages:
                average = self._averages[engine.name].network
                for unit, source in zip(pwlu.units(average), pwlu.units(engine.network), strict=True):
                    unit.load_state_dict(source.state_dict())
            engine.restart(activation_parameters(engine.network))
        self._tracking = []
        return True
