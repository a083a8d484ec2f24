"""Policies, the bits of every layer: how they are searched, and the JSON file between search and fine-tuning."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from training import checkpoint
from training.config import Config, ConfigError, UserError, require
from training.search.accounting import MIB, Bits, LayerSize, average_bits, ends, gbitops, size_mb
from training.search.program import Budget, solve

FORMAT = "quantkernels policy 1"

Costs = Mapping[str, Sequence[float]]
"""Layer name -> the cost of each bit-width, in the order of the set of bits."""


@dataclass(frozen=True)
class Budgets:
    """What a policy may cost; None: as much as it likes. At least one must be given.

    bitops: 10^9 bit operations an image, or [w, a]: as many as with w-bit weights and a-bit activations everywhere;
        the first and the last layer are not counted.
    size_mb: all weights, with the first and the last layer at 8 bits; 1 MB = 2^20 bytes.
    average_bits: [w, a] or w, means over the searched layers.
    """

    bitops: float | Sequence[int] | None = None
    size_mb: float | None = None
    average_bits: float | Sequence[float] | None = None

    def __post_init__(self) -> None:
        if self.bitops is None and self.size_mb is None and self.average_bits is None:
            raise ConfigError("the search needs a budget: bitops, size_mb or average_bits")
        for key, value in dataclasses.asdict(self).items():
            numbers = value if isinstance(value, list | tuple) else [value]
            positive = all(type(n) in (int, float) and n > 0 for n in numbers)
            pair = not isinstance(value, list | tuple) or (key != "size_mb" and len(value) == 2)
            rule = "a positive number" + ("" if key == "size_mb" else " or a pair [weights, activations]")
            require(value is None or (positive and pair), f"search.{key}", rule, value)

    def of(self, sizes: Mapping[str, LayerSize], pairs: np.ndarray) -> list[Budget]:
        """The budgets of the integer program. pairs: int [options, 2], the weight and activation bits of an option."""
        searched = {name: size for name, size in sizes.items() if name not in ends(sizes)}
        w, a = pairs.T.astype(float)
        found = []
        if self.bitops is not None:
            name, limit = "bitops (10^9)", self.bitops
            if not isinstance(limit, int | float):
                name += f" of {list(limit)} bits in every layer"
                limit = gbitops(searched, dict.fromkeys(searched, tuple(limit)))
            use = [size.macs / 1e9 * w * a for size in searched.values()]
            found.append(Budget(name, limit, use))
        if self.size_mb is not None:
            # what the fixed layers take is shared out, so that the messages speak of the whole network
            rest = size_mb({name: sizes[name] for name in sizes if name not in searched}, {}) / len(searched)
            use = [size.weights * w / 8 / MIB + rest for size in searched.values()]
            found.append(Budget("size_mb", self.size_mb, use))
        if self.average_bits is not None:
            pair = self.average_bits
            limits = [pair] if isinstance(pair, int | float) else list(pair)
            for name, limit, bits in zip(("weight", "activation"), limits, (w, a), strict=False):
                found.append(Budget(f"average_bits of the {name}s", limit, [bits / len(searched)] * len(searched)))
        return found


@dataclass(frozen=True)
class Policy:
    """The bits of every searched layer, how they were found and what the network costs with them."""

    layers: dict[str, tuple[int, int]]
    method: str
    about: dict[str, Any] = field(default_factory=dict)

    def to_table(self) -> dict[str, Any]:
        """What the file holds."""
        layers = {name: list(pair) for name, pair in self.layers.items()}
        return {"format": FORMAT, "method": self.method, "about": self.about, "layers": layers}

    def write(self, path: Path) -> None:
        """Write the JSON file, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write_atomically(path, (json.dumps(self.to_table(), indent=2) + "\n").encode())


def describe(sizes: Mapping[str, LayerSize], bits: Bits) -> dict[str, Any]:
    """Size, BitOps and average bits of a policy, for people and reports."""
    weight, activation = average_bits(bits)
    return {
        "size_mb": round(size_mb(sizes, bits), 6),
        "gbitops": round(gbitops(sizes, bits), 6),
        "average_bits": [round(weight, 4), round(activation, 4)],
    }


def read_policy(path: Path) -> dict[str, Any]:
    """The table in a policy file, checked as far as it can be without the network. Raises UserError."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a policy: {error}") from error
    if not isinstance(table, dict) or table.get("format") != FORMAT:
        raise UserError(f"{path} is not a policy: its format must be {FORMAT!r}")
    return table


def policy_path(folder: Path) -> Path:
    """Where the policy of a run is if the recipe does not say: beside the run's folder."""
    return folder.with_name(folder.name + ".policy.json")


def with_policy(config: Config, folder: Path) -> Config:
    """The recipe with the contents of its policy file in place of its path, so that a run's folder says it all.

    folder: that of the run. Raises UserError where the recipe needs a policy and there is none yet, or it cannot be
    read.
    """
    options = config.algorithm.options
    if config.algorithm.name != "mixed_precision" or isinstance(options.get("policy"), Mapping):
        return config
    path = Path(options["policy"]) if "policy" in options else policy_path(folder)
    if not path.is_file():
        raise UserError(f"there is no policy in {path}; `python -m training search RECIPE` finds one")
    algorithm = dataclasses.replace(config.algorithm, options={**options, "policy": read_policy(path)})
    return dataclasses.replace(config, algorithm=algorithm)


def option_pairs(weights: Sequence[int], activations: Sequence[int] | None) -> np.ndarray:
    """int [options, 2], all pairs (weight bits, activation bits); activations None: as many bits as the weight."""
    if activations is None:
        return np.array([(b, b) for b in weights])
    return np.array([(w, a) for w in weights for a in activations])


def best_bits(
    sizes: Mapping[str, LayerSize], pairs: np.ndarray, costs: Mapping[str, np.ndarray], budgets: Budgets
) -> dict[str, tuple[int, int]]:
    """The bits of every layer with the lowest sum of costs within the budgets. costs: name -> [options]."""
    names = [name for name in sizes if name not in ends(sizes)]
    chosen = solve([costs[name] for name in names], budgets.of(sizes, pairs))
    return {name: (int(pairs[i, 0]), int(pairs[i, 1])) for name, i in zip(names, chosen, strict=True)}
