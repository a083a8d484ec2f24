"""DNN quantization with attention (DQA): a mixture of quantizers that cools down to one of them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

import quantkernels as qk
from training.algorithms.base import (
    Algorithm,
    Criterion,
    build_quantizer,
    register,
    skip_option,
    split_parameters,
)
from training.config import ConfigError, choose, require

NORMALISATIONS = ("weights", "layers", "literal")
# Below this attention the selected quantizer is not yet what the network was trained with.
CONVERGED = 0.99
ROOMS = ("weight_quantizer", "activation_quantizer")

Tables = Mapping[str, Any] | Sequence[Mapping[str, Any]]


def build_tables(tables: Tables, where: str) -> list[nn.Module]:
    """The quantizers of a list of recipe tables, sorted by bits. Raises ConfigError."""
    require(len(tables) > 0, where, "a list of at least one quantizer", tables)
    quantizers = [build_quantizer(table, f"{where}[{i}]") for i, table in enumerate(tables)]
    return sorted(quantizers, key=lambda quantizer: quantizer.bits)


def relaxed_modules(model: nn.Module, kind: type[nn.Module] | tuple[type[nn.Module], ...]) -> dict[str, nn.Module]:
    """Path -> quantizer, for every weight or activation quantizer of that kind, in the model's order."""
    modules = model.named_modules()
    return {name: m for name, m in modules if isinstance(m, kind) and name.rpartition(".")[2] in ROOMS}


def count_weights(model: nn.Module) -> int:
    """S of eq. 6: elements of all weight tensors, quantized or not, without biases and batch-norm."""
    network, _ = split_parameters(model)
    return sum(parameter.numel() for parameter in network if parameter.dim() > 1)


@register("dqa")
class DQA(Algorithm):
    """Weights, or weights and activations, as mixtures with learned attention (Algorithm 1, eq. 1 to 7).

        [algorithm]
        name = "dqa"
        weight = [{kind = "MinMax", bits = 2}, {kind = "MinMax", bits = 4}, {kind = "MinMax", bits = 8}]
        activation = [{kind = "PACT", bits = 2}, {kind = "PACT", bits = 4}, {kind = "PACT", bits = 8}]
        penalty = 5.0            # lambda of eq. 6
        g = [1, 4, 16]           # not given: 4^k
        normalise = "weights"    # g^T a: its mean over weights; "layers": over layers; "literal": as printed
        temperature_start = 100.0
        temperature_end = 0.03
        select = 0               # which quantizer stays at the end; 0: the lowest bits
        skip = "none"            # or "first_and_last"

    `weight` or `activation` may also be one table, a quantizer without attention. `attention_lr` (not given:
    the recipe's) is for the logits, which never decay: each batch divides them by their deviation, which
    undoes a common factor. `quantizer_lr` and `quantizer_weight_decay` are for ranges such as PACT's alpha.
    """

    def __init__(
        self,
        weight: Tables | None = None,
        activation: Tables | None = None,
        penalty: float = 1.0,
        g: Sequence[float] | None = None,
        normalise: str = "weights",
        temperature_start: float = 100.0,
        temperature_end: float = 0.03,
        select: int = 0,
        skip: str = "none",
        attention_lr: float | None = None,
        quantizer_lr: float | None = None,
        quantizer_weight_decay: float | None = None,
    ) -> None:
        self.weight, self.activation = weight, activation
        self.penalty, self.g = penalty, g
        self.normalise = choose(normalise, NORMALISATIONS, "algorithm.normalise")
        self.temperature_start, self.temperature_end = temperature_start, temperature_end
        self.select = select
        self.skip = choose(skip, ("none", "first_and_last"), "algorithm.skip")
        self.attention_lr = attention_lr
        self.own = {"lr": quantizer_lr, "weight_decay": quantizer_weight_decay}
        self.total_steps = 0
        self._terms: list[tuple[list[qk.Attention], torch.Tensor, torch.Tensor]] = []
        self._check()

    def _check(self) -> None:
        require(self.penalty >= 0, "algorithm.penalty", "0 or positive", self.penalty)
        require(self.temperature_end > 0, "algorithm.temperature_end", "positive", self.temperature_end)
        cools = self.temperature_start >= self.temperature_end
        require(cools, "algorithm.temperature_start", "at least temperature_end", self.temperature_start)
        for key, value in {"attention_lr": self.attention_lr, **self.own}.items():
            require(value is None or value >= 0, f"algorithm.{key}", "0 or a positive number", value)
        mixtures = [self._build(room) for room in ("weight", "activation")]
        sizes = [len(mixture.quantizers) for mixture in mixtures if isinstance(mixture, qk.Attention)]
        if not sizes:
            raise ConfigError("algorithm.name = 'dqa' needs a list of quantizers as algorithm.weight or .activation")
        for size in sizes:
            require(0 <= self.select < size, "algorithm.select", f"from 0 to {size - 1}", self.select)
            fits = self.g is None or len(self.g) == size
            require(fits, "algorithm.g", f"one number for each of the {size} quantizers", self.g)

    def _build(self, room: str) -> nn.Module | None:
        tables = getattr(self, room)
        if tables is None:
            return None
        if isinstance(tables, Mapping):
            return build_quantizer(tables, f"algorithm.{room}")
        return qk.Attention(build_tables(tables, f"algorithm.{room}"))

    def prepare(self, model: nn.Module) -> nn.Module:
        """Swap every conv and linear layer (but the skipped ones) for its quantized form."""
        weight, activation = self._build("weight"), self._build("activation")
        return qk.prepare(model, weight=weight, activation=activation, skip=skip_option(self.skip))

    def parameter_groups(self, model: nn.Module, base: dict[str, Any]) -> list[dict[str, Any]]:
        """The network's parameters; the attention logits, without weight decay; learned ranges."""
        network, quantizers = split_parameters(model)
        logits = [mixture.logits for mixture in relaxed_modules(model, qk.Attention).values()]
        known = {id(parameter) for parameter in logits}
        ranges = [parameter for parameter in quantizers if id(parameter) not in known]
        attention = {**base, "weight_decay": 0.0}
        if self.attention_lr is not None:
            attention["lr"] = self.attention_lr
        own = {key: value for key, value in self.own.items() if value is not None}
        groups = [
            {"params": network, **base},
            {"params": logits, **attention},
            {"params": ranges, **base, **own},
        ]
        return [group for group in groups if group["params"]]

    def start(self, model: nn.Module, total_steps: int, steps_per_epoch: int, epochs: int) -> None:
        """Collect the mixtures and what each counts in the regulariser."""
        self.total_steps = total_steps
        found = relaxed_modules(model, qk.Attention)
        total = count_weights(model)
        self._terms = []
        for room in ROOMS:
            names = [name for name in found if name.endswith(room)]
            if not names:
                continue
            mixtures = [found[name] for name in names]
            layers = [model.get_submodule(name.rpartition(".")[0]) for name in names]
            device = mixtures[0].logits.device
            share = torch.tensor(self._shares([layer.weight.numel() for layer in layers], total), device=device)
            g = self.g if self.g is not None else [4.0**k for k in range(len(mixtures[0].logits))]
            self._terms.append((mixtures, torch.tensor(g, dtype=torch.float32, device=device), share))

    def _shares(self, sizes: list[int], total: int) -> list[float]:
        """What the term g^T a of each layer is multiplied by. sizes: weights of each layer; total: S."""
        if self.normalise == "weights":
            return [size / total for size in sizes]
        return [1 / len(sizes) if self.normalise == "layers" else 1 / total] * len(sizes)

    def temperature(self, step: int) -> float:
        """T(b) of eq. 5 for the batch b = step + 1, so that the last batch has temperature_end."""
        psi = math.exp(math.log(self.temperature_end / self.temperature_start) / self.total_steps)
        return self.temperature_start * psi ** (step + 1)

    def before_batch(self, model: nn.Module, step: int) -> None:
        """Cool down, then alpha <- alpha / std(alpha) in place (Algorithm 1)."""
        temperature = self.temperature(step)
        for mixtures, _, _ in self._terms:
            for mixture in mixtures:
                mixture.temperature.fill_(temperature)
                mixture.normalise_()

    def regulariser(self) -> torch.Tensor:
        """sum_l share_l * g^T a_l, without lambda (eq. 6; `normalise` is our reading of its S)."""
        terms = []
        for mixtures, g, share in self._terms:
            # One softmax over [layers, K] in place of one for each layer; all have the same temperature.
            logits = torch.stack([mixture.logits for mixture in mixtures])
            attention = torch.softmax(logits / mixtures[0].temperature, dim=1)
            terms.append((attention @ g) @ share)
        return torch.stack(terms).sum()

    def loss(
        self, model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor, criterion: Criterion
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """criterion + lambda * regulariser."""
        outputs = model(inputs)
        return criterion(outputs.float(), targets) + self.penalty * self.regulariser(), outputs

    def finish(self, model: nn.Module) -> None:
        """Hard selection of one quantizer everywhere; warns where its attention had not converged."""
        for name, mixture in relaxed_modules(model, qk.Attention).items():
            attention = mixture.attention()[self.select].item()
            if attention < CONVERGED:
                warnings.warn(
                    f"{name}: the attention on the selected quantizer ({self.select}) is {attention:.3f}, below "
                    f"{CONVERGED}: the network was trained with another mixture and will lose accuracy",
                    stacklevel=2,
                )
            mixture.select(self.select)

    def metrics(self, model: nn.Module) -> dict[str, Any]:
        """Attention of every mixture (also after selection: what it had), temperature, regulariser."""
        found = relaxed_modules(model, qk.Attention)
        with torch.no_grad():
            return {
                "attention": {name: mixture.attention().tolist() for name, mixture in found.items()},
                "temperature": float(next(iter(found.values())).temperature),
                "regulariser": float(self.regulariser()),
            }
