"""What an algorithm is to the engine, the registry of algorithms, and quantizers from recipe tables."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

import quantkernels as qk
from training.config import ConfigError, choose, require
from training.options import call_with_options

Criterion = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# name in a recipe -> module that registers it; a module is imported when its name is asked for
ALGORITHMS = {
    "float": "training.algorithms.vanilla",
    "vanilla": "training.algorithms.vanilla",
    "dqa": "training.algorithms.dqa",
    "binary_relax": "training.algorithms.binary_relax",
    "limpq": "training.algorithms.limpq",
    "diffq": "training.algorithms.diffq",
    "mixed_precision": "training.algorithms.mixed_precision",
    "switchable_bn": "training.algorithms.adaptive",
    "adabits": "training.algorithms.adaptive",
    "coquant": "training.algorithms.coquant",
    "lqnets": "training.algorithms.lqnets",
}
_REGISTRY: dict[str, type[Algorithm]] = {}


class Algorithm:
    """Plain training; the hooks that an algorithm overrides, in the order in which the engine calls them.

    An algorithm is constructed from the recipe's ``[algorithm]`` table: its keys are the keyword arguments
    of ``__init__``, which checks the values and raises `training.config.ConfigError`. All hooks but `loss`
    get the bare model, also where it is wrapped for several processes. What changes from step to step and is
    not a parameter or buffer of the model belongs into `state_dict`, so that a resumed run continues bit for
    bit. Random numbers need no care: the engine seeds python, numpy and torch from (seed, step) before each
    `before_batch` (the same on all processes) and the first `before_pass` (each process its own), and before
    `after_epoch`.
    """

    passes = 1
    """Forwards and backwards of one optimizer step: their gradients add up, processes share them once."""
    unused_parameters = False
    """Whether a step may leave parameters without a gradient, which several processes must be told of."""
    calibration_batches = 0
    """Training batches that `calibrate` gets; 0: it is not called."""

    def prepare(self, model: nn.Module) -> nn.Module:
        """Swap layers for quantized ones (`quantkernels.prepare`); the float model is returned as it is."""
        return model

    def wrap(self, model: nn.Module) -> nn.Module:
        """What `loss` gets as its model: a module around it whose forward runs it several times, say at several
        bit-widths. For several processes all that one backward needs must be one forward of one module."""
        return model

    def parameter_groups(self, model: nn.Module, base: dict[str, Any]) -> list[dict[str, Any]]:
        """Optimizer groups. `base` has the recipe's ``lr`` and ``weight_decay``; a group may differ."""
        return [{"params": list(model.parameters()), **base}]

    def start(self, model: nn.Module, total_steps: int, steps_per_epoch: int, epochs: int) -> None:
        """Once, before the first batch, and again in a resumed run, before `load_state_dict`."""

    def before_batch(self, model: nn.Module, step: int) -> None:
        """Before the forward of each training batch; `step` counts from 0 over the whole training."""

    def before_pass(self, model: nn.Module, index: int) -> None:
        """Before each of the `passes` calls of `loss` in a step, such as to change the bits; counts from 0."""

    def loss(
        self, model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor, criterion: Criterion
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(scalar loss with regularisers, outputs [N, classes]); `model` may be wrapped: call it whole."""
        outputs = model(inputs)
        return criterion(outputs.float(), targets), outputs

    def before_step(self, model: nn.Module) -> None:
        """Before the optimizer's step, with the step's whole gradients in place: to clip or to drop some."""

    def after_epoch(self, model: nn.Module, epoch: int) -> None:
        """After the last batch of an epoch (counted from 0), before it is evaluated."""

    def calibrate(self, model: nn.Module, batches: Callable[[], Iterator[torch.Tensor]]) -> None:
        """After the training, before `finish`, where `calibration_batches` asks for it: `batches()` gives the inputs
        of that many whole training batches, the same at each call and on every process."""

    def finish(self, model: nn.Module) -> None:
        """After the training and before the final evaluation: hard selection."""

    def results(self, model: nn.Module, evaluate: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Figures of the finished network beside its accuracy, under the names of the columns of the paper's table.

        Called once, after the final evaluation, on every process. `evaluate()` passes the test split through `model`
        as it stands (after `set_bits`, say) and gives eval_loss, eval_accuracy and eval_top5; accuracies are 0 to 1
        there, and in percent in what this returns: {"4 bits": 91.3, "size MB": 7.9}. Leave the network as it was.
        """
        return {}

    def metrics(self, model: nn.Module) -> dict[str, Any]:
        """Plain values (JSON) for the epoch's line in metrics.jsonl, such as the attention of every layer."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only: it is read back without unpickling arbitrary objects."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""


def register(name: str) -> Callable[[type[Algorithm]], type[Algorithm]]:
    """Class decorator: make an `Algorithm` known by its name in recipes (listed in `ALGORITHMS`)."""

    def add(cls: type[Algorithm]) -> type[Algorithm]:
        _REGISTRY[name] = cls
        return cls

    return add


def build_algorithm(name: str, options: Mapping[str, Any]) -> Algorithm:
    """The algorithm of a recipe's ``[algorithm]`` table. Raises ConfigError for what it cannot use."""
    choose(name, ALGORITHMS, "algorithm.name")
    importlib.import_module(ALGORITHMS[name])
    return call_with_options(_REGISTRY[name], options, "algorithm")


QUANTIZERS = (
    "MinMax", "SAWB", "PACT", "BWN", "TWN", "LSQ", "HWGQ", "DoReFa", "ModifiedDoReFa", "CentredDoReFa",
    "LearnedBasis", "Identity",
)  # fmt: skip


def build_quantizer(table: Mapping[str, Any], where: str = "algorithm.weight") -> nn.Module:
    """A quantizer of a table such as ``{kind = "MinMax", bits = 2}``.

    `kind` is one of `QUANTIZERS`; the other keys are that class's arguments (bits, axis, ste, alpha, plus, signed,
    highest, rescale).
    `where` is the table's name in error messages. Raises ConfigError.
    """
    require(isinstance(table, Mapping), where, 'a table such as {kind = "MinMax", bits = 2}', table)
    if "kind" not in table:
        raise ConfigError(f"the recipe must give {where}.kind, one of {', '.join(QUANTIZERS)}")
    kind = choose(table["kind"], QUANTIZERS, f"{where}.kind")
    options = {key: value for key, value in table.items() if key != "kind"}
    bits = options.get("bits", 1)
    require(type(bits) is int and 1 <= bits <= 8, f"{where}.bits", "an integer from 1 to 8", bits)
    try:
        return call_with_options(getattr(qk, kind), options, where)
    except (TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{where}: {error}") from error


def skip_option(value: str) -> Any:
    """The recipe's ``skip`` ("none" or "first_and_last") as the argument of `quantkernels.prepare`."""
    choose(value, ("none", "first_and_last"), "algorithm.skip")
    return qk.first_and_last if value == "first_and_last" else None


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(parameters of the network, of its quantizers: PACT's alpha, attention logits), each once."""
    network: list[nn.Parameter] = []
    quantizers: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        inside = {"weight_quantizer", "activation_quantizer"} & set(name.split("."))
        (quantizers if inside else network).append(parameter)
    return network, quantizers
