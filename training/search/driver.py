"""From a recipe with ``[algorithm.search]`` to a policy."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from training import engine
from training.algorithms.base import Algorithm
from training.algorithms.limpq import importance
from training.config import Config, ConfigError, UserError, choose, load, require
from training.data import Data, load_data
from training.data.loader import derive_seed, train_batches
from training.options import bit_set, call_with_options
from training.run_reader import read_run
from training.search.accounting import FIXED_BITS, LayerSize, ends, measure
from training.search.methods import hawq_costs, hutchinson_traces, limpq_costs
from training.search.policy import Budgets, Policy, best_bits, describe, option_pairs

METHODS = ("limpq", "hawq", "uniform")


@dataclass(frozen=True)
class Search:
    """``[algorithm.search]`` of a recipe.

    method: "limpq" (learned importance), "hawq" (curvature; activations get the bits of the weights) or "uniform"
        (the highest bits that all layers can have).
    indicators: of limpq, the recipe whose run has the importance indicators; the run of the same seed is read.
    alpha: of limpq, the weight of the weights' indicators against the activations'.
    bits: the set of bits; limpq has that of its indicators.
    weight_only: activations at 8 bits in every layer.
    probes, batches: of hawq, random vectors a batch, and batches of training images.
    bitops, size_mb, average_bits: see `Budgets`.
    """

    method: str = "limpq"
    indicators: str = ""
    alpha: float = 1.0
    bits: list[int] = field(default_factory=lambda: [6, 5, 4, 3, 2])
    weight_only: bool = False
    probes: int = 16
    batches: int = 4
    bitops: Any = None
    size_mb: Any = None
    average_bits: Any = None

    def __post_init__(self) -> None:
        choose(self.method, METHODS, "algorithm.search.method")
        require(self.alpha >= 0, "algorithm.search.alpha", "0 or positive", self.alpha)
        bit_set(self.bits, "algorithm.search.bits")
        for key in ("probes", "batches"):
            require(getattr(self, key) >= 1, f"algorithm.search.{key}", "at least 1", getattr(self, key))
        if self.method == "limpq" and not self.indicators:
            raise ConfigError("algorithm.search.indicators must name the recipe of the run with the indicators")
        _ = self.budgets  # checks them

    @property
    def budgets(self) -> Budgets:
        """The limits of the integer program."""
        return Budgets(**{f.name: getattr(self, f.name) for f in fields(Budgets)})

    def pairs(self, weights: list[int], activations: list[int] | None) -> np.ndarray:
        """All options of a layer: int [options, 2], weight and activation bits."""
        return option_pairs(weights, [FIXED_BITS] if self.weight_only else activations)


def search_of(config: Config) -> Search:
    """The recipe's ``[algorithm.search]``, checked. Raises ConfigError."""
    table = config.algorithm.options.get("search")
    if not isinstance(table, Mapping):
        raise ConfigError(f"a recipe of algorithm {config.algorithm.name!r} has no table [algorithm.search]")
    return call_with_options(Search, table, "algorithm.search")


def search(config: Config, indicators: Path | None, note: Callable[[str], None] = lambda text: None) -> Policy:
    """The policy that a recipe's ``[algorithm.search]`` asks for. `note` is told how long the parts take.

    indicators: the folder of the run with the indicators, of limpq. ``model.init`` must be a file by now. Raises
    UserError for a run that is missing or a budget that cannot be met.
    """
    options = search_of(config)
    data = load_data(config.data)
    model = engine.build(config, data, Algorithm())
    image, _ = data.train.eval_batch(torch.arange(1))
    sizes = measure(model, image)
    if len(sizes) < 3:
        raise UserError(f"{config.model.name} has no layer between its first and its last one: nothing to search")
    started = time.monotonic()
    if options.method == "uniform":
        bits = uniform_bits(sizes, options)
    else:
        if options.method == "limpq":
            assert indicators is not None
            pairs, cost = limpq_options(indicators, options, sizes)
        else:
            pairs, cost = hawq_options(config, options, sizes, model, data)
        note(f"sensitivities: {time.monotonic() - started:.2f} s")
        begun = time.monotonic()
        bits = best_bits(sizes, pairs, cost, options.budgets)
        note(f"integer program with {len(bits) * len(pairs)} binaries: {time.monotonic() - begun:.2f} s")
    about = describe(sizes, bits) | {"search_seconds": round(time.monotonic() - started, 3)}
    if indicators is not None:
        about["indicator_seconds"] = round(read_run(indicators).seconds, 3)
    about["search"] = dict(config.algorithm.options["search"])
    return Policy(bits, options.method, about)


def uniform_bits(sizes: Mapping[str, LayerSize], options: Search) -> dict[str, tuple[int, int]]:
    """The highest bits that all layers can have alike: the last of the integer program with one layer's choice."""
    pairs = options.pairs(sorted(options.bits), None)
    names = [name for name in sizes if name not in ends(sizes)]
    feasible = []
    for pair in pairs:
        try:
            alone = {name: np.zeros(1) for name in names}
            feasible.append(best_bits(sizes, pair[None], alone, options.budgets))
        except UserError:
            if not feasible:
                raise
            break
    return feasible[-1]


def indicators_folder(config: Config, root: Path) -> Path | None:
    """Where the run with the indicators is, of limpq. Raises UserError where there is none."""
    name, seed = search_of(config).indicators, config.run.seed
    if not name:
        return None
    folder = root / load(name, [f"run.seed={seed}"]).run.name
    if not folder.is_dir():
        command = f"python -m training run {name}" + (f" --set run.seed={seed}" if seed else "")
        raise UserError(f"there are no indicators in {folder}; train them first: {command}")
    return folder


def limpq_options(
    folder: Path, options: Search, sizes: Mapping[str, LayerSize]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(options of a layer, cost of every option) from the indicators of a finished run."""
    _, result = engine.load_run(folder)
    weight, activation = importance(result.model)
    missing = set(sizes) - ends(sizes) - set(weight)
    if missing:
        raise UserError(f"{folder} has no indicators of {', '.join(sorted(missing))}; it is a run of another network")
    if not activation and not options.weight_only:
        raise UserError(f"{folder} has indicators of weights alone; set algorithm.search.weight_only = true")
    first = next(iter(weight))
    pairs = options.pairs(list(weight[first]), list(activation[first]) if activation else None)
    return pairs, limpq_costs(weight, None if options.weight_only else activation, pairs, options.alpha)


def hawq_options(
    config: Config, options: Search, sizes: Mapping[str, LayerSize], model: nn.Module, data: Data
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(options of a layer, cost of every option) from traces of the Hessian of the float network's loss."""
    if not config.model.init:
        raise ConfigError("HAWQ needs a trained float network: set model.init to its weights or its run")
    names = [name for name in sizes if name not in ends(sizes)]
    pairs = options.pairs(options.bits, None)
    return pairs, hawq_costs(model, float_traces(model, data, names, config, options), pairs)


def float_traces(model: nn.Module, data: Data, names: list[str], config: Config, options: Search) -> dict[str, float]:
    """Mean over batches of training images of each layer's trace; on the accelerator where there is one."""
    device = torch.accelerator.current_accelerator() if config.run.device == "auto" else None
    model = model.to(device or "cpu").eval()
    generator = torch.Generator().manual_seed(derive_seed(config.run.seed, "hawq"))
    sums = dict.fromkeys(names, 0.0)
    batches = train_batches(data.train, config.data.batch_size, config.run.seed, epoch=0)
    count = 0
    for count, (images, targets) in enumerate(batches, start=1):
        loss = F.cross_entropy(model(images.to(device or "cpu")), targets.to(device or "cpu"))
        traces = hutchinson_traces(model, loss, names, options.probes, generator)
        sums = {name: total + traces[name] for name, total in sums.items()}
        if count == options.batches:
            break
    return {name: total / count for name, total in sums.items()}
