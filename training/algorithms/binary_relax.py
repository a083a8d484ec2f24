"""Binary-Relax (Yin et al. 2018): both forms of the DQA paper's comparison, and its own last phase."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

import quantkernels as qk
from training.algorithms.base import Algorithm, build_quantizer, register, skip_option, split_parameters
from training.algorithms.dqa import Tables, build_tables, relaxed_modules
from training.config import ConfigError, choose, require


@register("binary_relax")
class BinaryRelaxation(Algorithm):
    """q = (omega Q_1 + w) / (omega + 1), or (omega Q_1 + Q_2 + Q_3) / (omega + 2) (DQA, eq. 8).

        [algorithm]
        name = "binary_relax"
        weight = [{kind = "MinMax", bits = 2}]     # or three, e.g. 2, 4 and 8 bits
        activation = [{kind = "PACT", bits = 2}]   # relaxed in the same way; one table: not relaxed
        growth = 1.02                # omega starts at 1 and is multiplied by this every epoch
        final_phase = 1.0            # from this fraction of the epochs on Q_1 alone (Yin et al.); 1: never
        skip = "none"                # or "first_and_last"

    Gradients are taken at the relaxed point. At the end Q_1 alone stays, so that the network can be packed.
    """

    def __init__(
        self,
        weight: Tables | None = None,
        activation: Tables | None = None,
        growth: float = 1.02,
        final_phase: float = 1.0,
        skip: str = "none",
        quantizer_lr: float | None = None,
        quantizer_weight_decay: float | None = None,
    ) -> None:
        self.weight, self.activation = weight, activation
        self.growth, self.final_phase = growth, final_phase
        self.skip = choose(skip, ("none", "first_and_last"), "algorithm.skip")
        self.own = {"lr": quantizer_lr, "weight_decay": quantizer_weight_decay}
        self.steps_per_epoch = self.epochs = 0
        require(growth >= 1, "algorithm.growth", "at least 1", growth)
        require(0 <= final_phase <= 1, "algorithm.final_phase", "in [0, 1]", final_phase)
        for key, value in self.own.items():
            require(value is None or value >= 0, f"algorithm.quantizer_{key}", "0 or a positive number", value)
        if not any(isinstance(self._build(room), qk.BinaryRelax) for room in ("weight", "activation")):
            raise ConfigError("'binary_relax' needs a list of quantizers as algorithm.weight or .activation")

    def _build(self, room: str) -> nn.Module | None:
        tables, where = getattr(self, room), f"algorithm.{room}"
        if tables is None:
            return None
        if isinstance(tables, Mapping):
            return build_quantizer(tables, where)
        require(len(tables) in (1, 3), where, "a list of one or of three quantizers", tables)
        return qk.BinaryRelax(build_tables(tables, where), growth=self.growth)

    def prepare(self, model: nn.Module) -> nn.Module:
        """Swap every conv and linear layer (but the skipped ones) for its quantized form."""
        weight, activation = self._build("weight"), self._build("activation")
        return qk.prepare(model, weight=weight, activation=activation, skip=skip_option(self.skip))

    def parameter_groups(self, model: nn.Module, base: dict[str, Any]) -> list[dict[str, Any]]:
        """The network's parameters, and learned ranges with their own learning rate and weight decay."""
        network, quantizers = split_parameters(model)
        own = {key: value for key, value in self.own.items() if value is not None}
        groups = [{"params": network, **base}, {"params": quantizers, **base, **own}]
        return [group for group in groups if group["params"]]

    def start(self, model: nn.Module, total_steps: int, steps_per_epoch: int, epochs: int) -> None:
        """Remember the lengths that the schedule counts in."""
        self.steps_per_epoch, self.epochs = steps_per_epoch, epochs

    def before_batch(self, model: nn.Module, step: int) -> None:
        """At the first batch of an epoch: omega grows (not in the first epoch), or the last phase begins."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        if batch or (not epoch and self.final_phase > 0):
            return
        # Before the batch, not after the epoch: what is evaluated is the mixture that was trained.
        relaxed = relaxed_modules(model, qk.BinaryRelax).values()
        for module in relaxed:
            if epoch:
                module.step_epoch()
            if self.final_phase < 1 and epoch >= self.final_phase * self.epochs:
                module.select()

    def finish(self, model: nn.Module) -> None:
        """Q_1 alone from here on."""
        for module in relaxed_modules(model, qk.BinaryRelax).values():
            module.select()

    def metrics(self, model: nn.Module) -> dict[str, Any]:
        """omega, the same in every layer."""
        return {"omega": float(next(iter(relaxed_modules(model, qk.BinaryRelax).values())).omega)}
