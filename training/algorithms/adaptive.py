"""Adaptive networks: one network for several bit-widths, trained jointly. Switchable batch-norm and AdaBits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

import quantkernels as qk
from quantkernels.nn import SwitchableBatchNorm2d, calibrate_batch_norm
from training.algorithms.base import Algorithm, Criterion, build_quantizer, register, split_parameters
from training.config import ConfigError, choose, require
from training.options import bit_set

Loss = tuple[torch.Tensor, torch.Tensor]  # (scalar, logits [N, classes])
Sweep = Callable[[nn.Module, torch.Tensor, torch.Tensor, Criterion], Loss]

SKIPS = {
    "none": None,
    "first": lambda layers: list(layers)[:1],
    "first_and_last": qk.first_and_last,
}


class Joint(nn.Module):
    """A network whose one forward is the whole sweep over the bit-widths, with the statistics of weights shared."""

    def __init__(self, network: nn.Module, sweep: Sweep) -> None:
        super().__init__()
        self.network = network
        self.sweep = sweep

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor, criterion: Criterion) -> Loss:
        """What the sweep gives for a batch."""
        with qk.shared_statistics():
            return self.sweep(self.network, inputs, targets, criterion)


def nearest_width(bits: int, widths: Iterable[int]) -> int:
    """The bit-width nearest to `bits`, of two as near the higher one."""
    return min(widths, key=lambda width: (abs(width - bits), -width))


def zero_shot(model: nn.Module, bits: int, trained: Sequence[int], inputs: Iterable[torch.Tensor]) -> None:
    """Make `bits`, for which the model has a place but no training, ready: leaves the model at that precision.

    Batch-norm and clipping levels are those of the nearest of the `trained` bit-widths (of two the higher); then the
    batch-norms get statistics of their own from `inputs`, batches as in training. CoQuant, section on zero-shot tests.
    """
    qk.copy_bits(model, nearest_width(bits, trained), bits)
    calibrate_batch_norm(qk.set_bits(model, bits), inputs)


@register("switchable_bn")
class SwitchableBN(Algorithm):
    """Joint training: in each step one forward and one cross-entropy a bit-width, one backward of their sum.

        [algorithm]
        name = "switchable_bn"
        bits = [8, 6, 4, 2]
        zero_shot = [7, 5, 3]            # evaluated without training, after batch-norm calibration
        calibration_batches = 20         # training batches for that
        weight = "ModifiedDoReFa"        # or CentredDoReFa, whose codes nest too, or DoReFa, MinMax, ... by name
        alpha = 8.0                      # where PACT's clipping levels start, one a layer and bit-width
        linear_alpha = 10.0              # of linear layers; not given: as the others
        skip = "first_and_last"          # these stay float; or "first", "none"
        divide_lr = false                # learning rates divided by the number of bit-widths
        quantizer_lr = 0.1               # of clipping levels; not given: optimizer.lr
        quantizer_weight_decay = 1e-4    # not given: optimizer.weight_decay

    Batch-norms (parameters and statistics) and clipping levels are apart for each bit-width, weights are shared. The
    network is trained, evaluated after epochs and left at the highest bit-width; in the end all are evaluated.
    """

    rescale_linear = False
    """Whether the weights of linear layers are divided by sqrt(n_out Var[q])."""
    default_skip = "first_and_last"
    default_linear_alpha: float | None = None

    def __init__(
        self,
        bits: Sequence[int],
        zero_shot: Sequence[int] = (),
        calibration_batches: int = 20,
        weight: str = "ModifiedDoReFa",
        alpha: float = 8.0,
        linear_alpha: float | None = None,
        skip: str | None = None,
        divide_lr: bool = False,
        quantizer_lr: float | None = None,
        quantizer_weight_decay: float | None = None,
    ) -> None:
        self.bits = bit_set(bits, "algorithm.bits", lowest=1)
        self.untrained = bit_set(zero_shot, "algorithm.zero_shot", lowest=1) if zero_shot else []
        both = set(self.bits) & set(self.untrained)
        require(not both, "algorithm.zero_shot", "of bits that algorithm.bits does not have", zero_shot)
        valid = type(calibration_batches) is int and calibration_batches >= 1
        require(valid, "algorithm.calibration_batches", "an integer of at least 1", calibration_batches)
        self.calibration_batches = calibration_batches if self.untrained else 0
        require(type(divide_lr) is bool, "algorithm.divide_lr", "true or false", divide_lr)
        self.weight, self.alpha, self.divide_lr = weight, alpha, divide_lr
        self.linear_alpha = self.default_linear_alpha if linear_alpha is None else linear_alpha
        self.skip = choose(self.default_skip if skip is None else skip, SKIPS, "algorithm.skip")
        self.own = {"lr": quantizer_lr, "weight_decay": quantizer_weight_decay}
        for key, value in self.own.items():
            rule = value is None or (isinstance(value, int | float) and value >= 0)
            require(rule, f"algorithm.quantizer_{key}", "0 or a positive number", value)
        for linear in (False, True):  # so that what is wrong with the quantizers is said at once
            self._settings(linear)

    @property
    def widths(self) -> list[int]:
        """All bit-widths that the network has, trained or not, highest first."""
        return sorted([*self.bits, *self.untrained], reverse=True)

    def _settings(self, linear: bool) -> dict[str, nn.Module]:
        """The quantizers of a convolution or a linear layer. Raises ConfigError."""
        weight: dict[str, Any] = {"kind": self.weight, "bits": self.bits[0]}
        if linear and self.rescale_linear:
            weight["rescale"] = True
        alpha = self.linear_alpha if linear and self.linear_alpha is not None else self.alpha
        activation = {"kind": "PACT", "bits": self.bits[0], "alpha": alpha, "per_bit": self.widths}
        built = build_quantizer(weight, "algorithm.weight")
        try:
            for bits in self.widths:
                built.check_bits(bits)
        except ValueError as error:
            raise ConfigError(f"algorithm.weight = {self.weight!r} cannot change its bits: {error}") from error
        return {"weight": built, "activation": build_quantizer(activation, "algorithm.alpha")}

    def prepare(self, model: nn.Module) -> nn.Module:
        """Quantized layers, and batch-norms for each bit-width."""
        linear = [name for name, module in model.named_modules() if type(module) is nn.Linear]
        overrides = {name: self._settings(True) for name in linear}
        model = qk.prepare(model, **self._settings(False), skip=SKIPS[self.skip], overrides=overrides)
        model = qk.switch_batch_norms(model, self.widths)
        for norm in (m for m in model.modules() if isinstance(m, SwitchableBatchNorm2d)):
            for bits in self.untrained:
                norm.norms[str(bits)].requires_grad_(False)
        return qk.set_bits(model, self.bits[0])

    def parameter_groups(self, model: nn.Module, base: dict[str, Any]) -> list[dict[str, Any]]:
        """The network's parameters; clipping levels with their own learning rate and weight decay."""
        network, quantizers = split_parameters(model)
        own = {**base, **{key: value for key, value in self.own.items() if value is not None}}
        groups = [{"params": network, **base}, {"params": quantizers, **own}]
        if self.divide_lr:
            groups = [{**group, "lr": group["lr"] / len(self.bits)} for group in groups]
        return [group for group in groups if group["params"]]

    def wrap(self, model: nn.Module) -> nn.Module:
        """One forward that is the sweep."""
        return Joint(model, self.sweep)

    def loss(
        self, model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor, criterion: Criterion
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(sum of the losses of all bit-widths, logits of the highest)."""
        return model(inputs, targets, criterion)

    def sweep(self, network: nn.Module, inputs: torch.Tensor, targets: torch.Tensor, criterion: Criterion) -> Loss:
        """A forward at each bit-width, from the highest down; the sum of their cross-entropies."""
        logits = [qk.set_bits(network, bits)(inputs).float() for bits in self.bits]
        return torch.stack([criterion(outputs, targets) for outputs in logits]).sum(), logits[0]

    def after_epoch(self, model: nn.Module, epoch: int) -> None:
        """Back to the highest bit-width."""
        qk.set_bits(model, self.bits[0])

    def calibrate(self, model: nn.Module, batches: Callable[[], Iterator[torch.Tensor]]) -> None:
        """The bit-widths that were not trained."""
        for bits in self.untrained:
            zero_shot(model, bits, self.bits, batches())
        qk.set_bits(model, self.bits[0])

    def results(self, model: nn.Module, evaluate: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Top-1 accuracy in percent at every bit-width."""
        found = {}
        for bits in self.widths:
            qk.set_bits(model, bits)
            found[f"{bits} bits"] = 100 * evaluate()["eval_accuracy"]
        qk.set_bits(model, self.bits[0])
        return found


@register("adabits")
class AdaBits(SwitchableBN):
    """AdaBits (Jin et al. 2020): joint training, with a clipping level a bit-width and a rescaled last layer.

    Options as of "switchable_bn" with other defaults: clipping levels of linear layers start at 10, and only the first
    layer stays float (`skip = "first"`), since the last one's weights are divided by sqrt(n_out Var[q]), the variance
    being that of the quantized weights. `weight` is "ModifiedDoReFa" or "CentredDoReFa".
    """

    rescale_linear = True
    default_skip = "first"
    default_linear_alpha = 10.0
