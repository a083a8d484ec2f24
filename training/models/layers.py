"""What several networks share: initialisation, and the width of a thinner or wider network."""

from __future__ import annotations

from torch import nn

from training.config import require


def initialise(model: nn.Module) -> None:
    """Kaiming-normal convolutions (He et al., 2015, fan-out), batch-norm 1 and 0, linear as in torch."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


def scaled(channels: int, width: float) -> int:
    """`channels` of a network that is `width` times as wide. Raises ConfigError unless `width` is positive."""
    require(type(width) in (int, float) and width > 0, "model.width", "a positive number", width)
    return max(1, round(channels * width))


def check_dropout(dropout: float) -> None:
    """Raise ConfigError unless `dropout` is a probability below 1."""
    valid = type(dropout) in (int, float) and 0 <= dropout < 1
    require(valid, "model.dropout", "a number in [0, 1)", dropout)
