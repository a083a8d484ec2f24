"""CoQuant: joint training in which a higher bit-width, chosen anew for each batch, teaches each lower one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from accelerate.utils import reduce
from torch import nn
from torch.nn import functional as F

import quantkernels as qk
from quantkernels.nn import QuantizedLayer
from training.algorithms.adaptive import Loss, SwitchableBN
from training.algorithms.base import Criterion, register
from training.config import UserError, choose, require
from training.models.mobilenet import InvertedResidual
from training.models.preactivation import PreactivationBlock
from training.models.resnet import BasicBlock, Bottleneck

BLOCKS = (BasicBlock, Bottleneck, PreactivationBlock, InvertedResidual)
TEACHERS = ("dynamic", "fixed", "recursive")
SWAPS = ("depth", "uniform", "none")


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Low where the labels are likely."""
    return F.cross_entropy(logits, targets)


def unsureness(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """1 - the mean of the largest probability."""
    return 1 - logits.softmax(1).amax(1).mean()


def entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The mean entropy of the prediction."""
    return -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()


# What makes a teacher better the lower it is, 0-d.
CONFIDENCES = {"cross_entropy": cross_entropy, "max_probability": unsureness, "entropy": entropy}


def residual_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks that can be swapped, in the order of the forward."""
    return [module for module in model.modules() if isinstance(module, BLOCKS)]


def keep_probabilities(first: float, blocks: int, swap: str) -> torch.Tensor:
    """p_l, float32 [blocks]: how likely each block of the student stays its own.

    swap "depth": p_l = p_1 + (l - 1)/(L - 1) * (1 - p_1), from p_1 to 1; "uniform": p_1; "none": 1.
    """
    if swap == "none":
        return torch.ones(blocks)
    depth = torch.linspace(0, 1, blocks) if swap == "depth" and blocks > 1 else torch.zeros(blocks)
    return first + depth * (1 - first)


@torch.no_grad()
def distances(model: nn.Module, widths: Sequence[int]) -> torch.Tensor:
    """float32 [n, n]: sum over layers of ||W_i - W_j||_2, W_i the weights quantized to widths[i] bits."""
    sums: dict[tuple[int, int], list[torch.Tensor]] = {pair: [] for pair in combinations(range(len(widths)), 2)}
    device = next(model.parameters()).device
    for layer in (m for m in model.modules() if isinstance(m, QuantizedLayer) and m.weight_quantizer is not None):
        quantizer, present = layer.weight_quantizer, layer.weight_quantizer.bits
        weights = []
        for bits in widths:
            quantizer.set_bits(bits)
            weights.append(quantizer(layer.weight))
        quantizer.set_bits(present)
        for (i, j), norms in sums.items():
            norms.append(torch.linalg.vector_norm(weights[i] - weights[j]))
    found = torch.zeros(len(widths), len(widths), device=device)
    for (i, j), norms in sums.items():
        found[i, j] = found[j, i] = torch.stack(norms).sum()
    return found


def distillation(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student), mean over the batch, temperature 1; no gradient to the teacher."""
    return F.kl_div(student.log_softmax(1), teacher.detach().log_softmax(1), reduction="batchmean", log_target=True)


@register("coquant")
class CoQuant(SwitchableBN):
    """CoQuant (Sun et al. 2021, Algorithm 1): teachers are chosen by confidence and distance, and lend their blocks.

        [algorithm]
        name = "coquant"                 # and the options of "switchable_bn"
        teacher = "dynamic"              # "fixed": the highest bit-width; "recursive": the next higher one
        confidence = "cross_entropy"     # of a dynamic teacher's prediction; or "max_probability", "entropy"
        distance = 1e-3                  # lambda: weight of the distance of quantized weights; 0: without
        swap = "depth"                   # how likely a block is swapped falls with depth; or "uniform", "none"
        p1 = 0.9                         # how likely the first block stays the student's at first; grows to 1

    In each batch, from the highest bit-width b_1 down: b_1 learns from the labels; each b below chooses the teacher

        t = argmin over t > b of CE(y_t, y) + lambda * sum over layers of ||W_t - W_b||_2          (equation 4)

    and learns from the labels and from KL(y_t || y_b), y_b being the forward in which each residual block is the
    teacher's (its bits, batch-norm and clipping level) with probability 1 - p_l. p_1 grows linearly over the epochs,
    to 1 in the last one; y_t is what the teacher's own forward gave, blocks that it was lent included. Draws and
    choices are the same on all processes, the choice being that of the whole batch.
    """

    def __init__(
        self,
        bits: Sequence[int],
        teacher: str = "dynamic",
        confidence: str = "cross_entropy",
        distance: float = 1e-3,
        swap: str = "depth",
        p1: float = 0.9,
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
        super().__init__(
            bits, zero_shot, calibration_batches, weight, alpha, linear_alpha, skip, divide_lr, quantizer_lr,
            quantizer_weight_decay,
        )  # fmt: skip
        self.teacher = choose(teacher, TEACHERS, "algorithm.teacher")
        self.confidence = CONFIDENCES[choose(confidence, CONFIDENCES, "algorithm.confidence")]
        require(distance >= 0, "algorithm.distance", "0 or positive", distance)
        require(0 <= p1 <= 1, "algorithm.p1", "in [0, 1]", p1)
        self.distance, self.first = distance, p1
        self.swap = choose(swap, SWAPS, "algorithm.swap")
        self.unused_parameters = self.swap != "none"  # a batch-norm whose block is lent has nothing to do
        self.steps_per_epoch = self.epochs = 1
        self.blocks: list[nn.Module] = []
        self.lent: list[list[bool]] = []  # [students][blocks]: which the teacher lends in this batch
        self.choices = torch.zeros(len(self.bits), len(self.bits), dtype=torch.int64)  # [student, teacher], this epoch

    def prepare(self, model: nn.Module) -> nn.Module:
        """As for switchable batch-norm. Raises UserError where blocks shall be swapped and there are none."""
        if self.swap != "none" and not residual_blocks(model):
            raise UserError(
                f"algorithm.swap = {self.swap!r} needs a network with residual blocks (a ResNet, MobileNetV2), and "
                f"{type(model).__name__} has none; use algorithm.swap = 'none'"
            )
        return super().prepare(model)

    def start(self, model: nn.Module, total_steps: int, steps_per_epoch: int, epochs: int) -> None:
        """Find the blocks; remember the lengths that the schedule counts in."""
        self.steps_per_epoch, self.epochs = steps_per_epoch, epochs
        self.blocks = residual_blocks(model)
        self.choices = self.choices.to(next(model.parameters()).device)

    def first_probability(self, step: int) -> float:
        """p_1 in the epoch of that step."""
        progress = step // self.steps_per_epoch / max(1, self.epochs - 1)
        return self.first + (1 - self.first) * min(progress, 1.0)

    def before_batch(self, model: nn.Module, step: int) -> None:
        """Draw which blocks are lent to each student; a new epoch counts its choices anew."""
        if step % self.steps_per_epoch == 0:
            self.choices.zero_()
        keep = keep_probabilities(self.first_probability(step), len(self.blocks), self.swap)
        self.lent = (torch.rand(len(self.bits), len(self.blocks)) >= keep).tolist()

    def sweep(self, network: nn.Module, inputs: torch.Tensor, targets: torch.Tensor, criterion: Criterion) -> Loss:
        """The batch of Algorithm 1: (sum of the losses, logits of the highest bit-width)."""
        apart = distances(network, self.bits) if self._compares else None
        logits: list[torch.Tensor] = []
        losses: list[torch.Tensor] = []
        for student, bits in enumerate(self.bits):
            qk.set_bits(network, bits)
            if student == 0:
                logits.append(network(inputs).float())
                losses.append(criterion(logits[0], targets))
                continue
            choice = self._choose(student, logits, targets, apart)
            teacher = torch.stack(logits).index_select(0, choice.reshape(1))[0]
            self._lend(student, choice)
            logits.append(network(inputs).float())
            losses += [criterion(logits[-1], targets), distillation(logits[-1], teacher)]
        return torch.stack(losses).sum(), logits[0]

    @property
    def _compares(self) -> bool:
        """Whether some student has several teachers, and their distance counts."""
        return self.teacher == "dynamic" and self.distance > 0 and len(self.bits) > 2

    def _known(self, student: int) -> int | None:
        """Index in `bits` of a teacher that does not depend on the batch; None for one that is chosen."""
        if self.teacher == "recursive":
            return student - 1
        return 0 if self.teacher == "fixed" or student == 1 else None

    @torch.no_grad()
    def _choose(
        self, student: int, logits: list[torch.Tensor], targets: torch.Tensor, apart: torch.Tensor | None
    ) -> torch.Tensor:
        """Index of the teacher in `bits`, int64 0-d on the device; counts it."""
        known = self._known(student)
        if known is None:
            scores = torch.stack([self.confidence(outputs, targets) for outputs in logits])
            scores = reduce(scores, "mean")  # every process has the same share of the batch
            choice = (scores if apart is None else scores + self.distance * apart[student, :student]).argmin()
        else:
            # torch.full fills on the device, where a tensor of a Python number would be copied there
            choice = torch.full((), known, dtype=torch.int64, device=targets.device)
        self.choices[student] += torch.arange(len(self.bits), device=choice.device) == choice
        return choice

    def _lend(self, student: int, choice: torch.Tensor) -> None:
        """Give the drawn blocks the teacher's precision."""
        lent = [block for block, swapped in zip(self.blocks, self.lent[student], strict=True) if swapped]
        if not lent:
            return
        known = self._known(student)
        # Which kernels come next depends on the choice: the one place where the host must wait for it.
        teacher = int(choice) if known is None else known
        for block in lent:
            qk.set_bits(block, self.bits[teacher])

    def metrics(self, model: nn.Module) -> dict[str, Any]:
        """How often each teacher was chosen in the epoch: {student's bits: {teacher's bits: batches}}."""
        counts = self.choices.tolist()
        return {
            "teachers": {
                str(bits): {str(self.bits[t]): counts[student][t] for t in range(student)}
                for student, bits in enumerate(self.bits)
                if student
            }
        }

    def state_dict(self) -> dict[str, Any]:
        """The choices of the epoch so far."""
        return {"choices": self.choices.cpu()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them."""
        self.choices.copy_(state["choices"])
