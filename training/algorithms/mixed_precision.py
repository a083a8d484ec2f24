"""Fine-tuning with LSQ at the bits of a policy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

import quantkernels as qk
from training.algorithms.base import Algorithm, register, split_parameters
from training.algorithms.limpq import layers_of, prepare_lsq
from training.config import ConfigError, nearest, require
from training.search.accounting import Bits, ends

# column of a table -> what a policy's file calls it
COLUMNS = {
    "size MB": "size_mb",
    "GBitOps": "gbitops",
    "indicators s": "indicator_seconds",
    "search s": "search_seconds",
}


def check_policy(layers: Mapping[str, Any], names: Sequence[str]) -> Bits:
    """Layer -> (weight bits, activation bits), of a policy's table of `layers`, for a network with layers `names`.

    Raises ConfigError for an unknown layer, a missing one and bits outside 2 to 8.
    """
    searched = [name for name in names if name not in ends(names)]
    for name, pair in layers.items():
        if name not in searched:
            near = nearest(name, searched)
            raise ConfigError(f"the policy names the layer {name!r}, whose bits are not searched; {near}")
        valid = isinstance(pair, list | tuple) and len(pair) == 2 and all(type(b) is int and 2 <= b <= 8 for b in pair)
        require(valid, f"the policy's bits of {name!r}", "a pair of integers from 2 to 8", pair)
    missing = [name for name in searched if name not in layers]
    if missing:
        raise ConfigError(f"the policy has no bits for {', '.join(missing)}")
    return {name: (pair[0], pair[1]) for name, pair in layers.items()}


@register("mixed_precision")
class MixedPrecision(Algorithm):
    """LSQ with bits of its own for every layer (LIMPQ's fine-tuning); the first and the last layer have 8.

        [algorithm]
        name = "mixed_precision"
        policy = "policy.json"       # not given: runs/NAME.policy.json, where `search` writes it
        signed_inputs = []           # as of "limpq"
        calibration_batches = 32     # batch-norm statistics at the end, anew from that many; 0: those of the training

        [algorithm.search]           # how `python -m training search` finds it: training.search.driver.Search

    The policy's contents replace its path in the run's config.json.
    """

    def __init__(
        self,
        policy: Mapping[str, Any] | str | None = None,
        search: Mapping[str, Any] | None = None,
        signed_inputs: Sequence[str] = (),
        calibration_batches: int = 32,
    ) -> None:
        self.policy = policy
        self.signed_inputs = signed_inputs
        require(calibration_batches >= 0, "algorithm.calibration_batches", "0 or positive", calibration_batches)
        self.calibration_batches = calibration_batches

    def prepare(self, model: nn.Module) -> nn.Module:
        """LSQ at the policy's bits. Raises ConfigError where the policy does not fit the network."""
        if not isinstance(self.policy, Mapping):
            raise ConfigError("'mixed_precision' needs a policy; `python -m training search RECIPE` finds one")
        bits = check_policy(self.policy.get("layers", {}), layers_of(model))
        return prepare_lsq(model, bits, self.signed_inputs)

    def parameter_groups(self, model: nn.Module, base: dict[str, Any]) -> list[dict[str, Any]]:
        """The network's parameters and the steps, alike."""
        network, steps = split_parameters(model)
        return [{"params": network, **base}, {"params": steps, **base}]

    def calibrate(self, model: nn.Module, batches: Callable[[], Iterator[torch.Tensor]]) -> None:
        """Batch-norm statistics of the final weights."""
        qk.nn.calibrate_batch_norm(model, batches())

    def results(self, model: nn.Module, evaluate: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Size, BitOps and average bits of the policy; seconds of the training of its indicators, and of its search."""
        assert isinstance(self.policy, Mapping)
        about = self.policy.get("about", {})
        found = {column: about[key] for column, key in COLUMNS.items() if key in about}
        return found | dict(zip(("weight bits", "activation bits"), about.get("average_bits", []), strict=False))

    def metrics(self, model: nn.Module) -> dict[str, Any]:
        """The policy: bits of every layer, size, BitOps, time of the search."""
        assert isinstance(self.policy, Mapping)
        return {"bits": self.policy["layers"], "method": self.policy.get("method"), **self.policy.get("about", {})}
