"""The training loop, on Hugging Face accelerate.

Everything random is a function of (seed, epoch, step): the order of the images, their augmentation, and
python's, numpy's and torch's generators, which are seeded anew for each step. A run that is killed and
resumed therefore ends with the same weights, bit for bit, on the same machine with the same number of
processes.

metrics.jsonl has a line {"kind": "epoch", ...} after each epoch and one {"kind": "final", ...} after the
algorithm's `finish`: epoch (epochs done), step (steps done), lr, train_loss, train_accuracy, eval_loss,
eval_accuracy and eval_top5 (of the test split, where the epoch was evaluated), seconds (of the epoch), algorithm
(what `Algorithm.metrics` gave); the final one also results (what `Algorithm.results` gave).
"""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, broadcast, broadcast_object_list
from torch import nn
from torch.nn import functional as F

from training import checkpoint
from training.algorithms.base import Algorithm, build_algorithm
from training.config import Config, ConfigError, UserError, from_tables
from training.data import Data, load_data
from training.data.loader import derive_seed, eval_batches, steps_per_epoch, train_batches
from training.models import build_model
from training.progress import Display
from training.run_folder import RunFolder, load_state
from training.schedule import lr_factor
from training.search.policy import with_policy


@dataclass
class Result:
    """What a run gave: the trained model (on the CPU, in eval mode), its folder and its metrics."""

    model: nn.Module
    data: Data
    folder: Path
    metrics: list[dict[str, Any]]
    already_finished: bool = False

    @property
    def accuracy(self) -> float:
        """Top-1 accuracy of the final model on the test split, 0 to 1."""
        return self.metrics[-1]["eval_accuracy"]


def run(config: Config, folder: Path | str, resume: bool = False, show: bool = False) -> Result:
    """Train as `config` says, with everything written to `folder`.

    `resume` continues a run from its last checkpoint; one that is finished is loaded. `show` prints
    progress (on the main process). Raises `training.config.UserError` for everything that the user can put
    right.
    """
    return Trainer(with_policy(config, Path(folder)), Path(folder), show).run(resume)


def build(config: Config, data: Data, algorithm: Algorithm) -> nn.Module:
    """The network of a recipe, from its seed or its file, with the algorithm's layers swapped in."""
    seed_everything(derive_seed(config.run.seed, "model"))
    model = build_model(config.model.name, data.num_classes, in_channels=data.channels, **config.model.options)
    if config.model.init:
        load_state(model, Path(config.model.init))
    return algorithm.prepare(model)


def load_run(folder: Path | str) -> tuple[Config, Result]:
    """A finished run from its folder. Raises UserError where there is none, or its data cannot be found."""
    files = RunFolder(Path(folder))
    config = from_tables(files.about()["recipe"])
    if not files.finished:
        raise UserError(f"the run in {folder} is not finished; continue it with --resume")
    data = load_data(config.data)
    model = build(config, data, build_algorithm(config.algorithm.name, config.algorithm.options))
    load_state(model, files.model)
    return config, Result(model.eval(), data, Path(folder), files.read_metrics(), already_finished=True)


def seed_everything(seed: int) -> None:
    """Seed python's, numpy's and torch's generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:  # torch.manual_seed would note a stack trace each time, for GPUs that might appear
        torch.default_generator.manual_seed(seed)


def build_optimizer(config: Config, algorithm: Algorithm, model: nn.Module) -> torch.optim.Optimizer:
    """The recipe's optimizer over the algorithm's parameter groups."""
    o = config.optimizer
    groups = algorithm.parameter_groups(model, {"lr": o.lr, "weight_decay": o.weight_decay})
    for group in groups:
        group["initial_lr"] = group["lr"]
    if o.name == "sgd":
        return torch.optim.SGD(groups, lr=o.lr, momentum=o.momentum, nesterov=o.nesterov)
    return (torch.optim.AdamW if o.name == "adamw" else torch.optim.Adam)(groups, lr=o.lr)


def make_accelerator(config: Config, algorithm: Algorithm) -> Accelerator:
    """An Accelerator with the recipe's precision. Raises ConfigError where the machine does not have it."""
    AcceleratorState._reset_state()  # it is process-wide, and refuses a second run's other precision
    mode = config.run.mixed_precision
    cpu = config.run.device == "cpu" or not torch.accelerator.is_available()
    # the last of several passes, the one that shares the gradients, need not use every parameter
    unused = algorithm.passes > 1 or algorithm.unused_parameters
    distributed = DistributedDataParallelKwargs(find_unused_parameters=unused)
    try:
        # without cpu=True, processes that torchrun starts on a machine without a GPU would not find each other
        accelerator = Accelerator(mixed_precision=mode, cpu=cpu, kwargs_handlers=[distributed])
    except ValueError as error:
        raise ConfigError(f"run.mixed_precision = {mode!r} does not work on this machine: {error}") from error
    if mode == "fp16" and accelerator.scaler is None:  # accelerate would train in float32 without a word
        raise ConfigError("run.mixed_precision = 'fp16' needs a GPU; use 'bf16' or 'no'")
    return accelerator


def make_deterministic(on: bool) -> None:
    """Choose deterministic kernels where torch has them."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(on, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a pass over memory that catches bugs only
    torch.backends.cudnn.benchmark = not on


class Trainer:
    """One run: built whole from the config, before anything is written."""

    def __init__(self, config: Config, folder: Path, show: bool) -> None:
        self.config = config
        self.files = RunFolder(folder)
        make_deterministic(config.run.deterministic)
        self.algorithm = build_algorithm(config.algorithm.name, config.algorithm.options)
        self.accelerator = make_accelerator(config, self.algorithm)
        self.main = self.accelerator.is_main_process
        self.data = load_data(config.data)
        self.steps_per_epoch = self._check_batch_size()
        self.total_steps = self.steps_per_epoch * config.run.epochs
        self.bare = build(config, self.data, self.algorithm)
        self.display = Display(config.run.name, show and self.main)
        # where the run stands
        self.epoch = 0
        self.step_in_epoch = 0
        self.sums = torch.zeros(2, dtype=torch.float64, device=self.accelerator.device)  # loss, correct

    def _check_batch_size(self) -> int:
        batch, processes = self.config.data.batch_size, self.accelerator.num_processes
        if batch % processes:
            raise ConfigError(f"data.batch_size = {batch} cannot be shared evenly by {processes} processes")
        steps = steps_per_epoch(self.data.train, batch)
        if not steps:
            n = len(self.data.train.labels)
            raise ConfigError(f"data.batch_size = {batch} is more than the {n} training images")
        return steps

    def run(self, resume: bool) -> Result:
        """Open the folder, train what is left, finish."""
        try:
            self._open_folder(resume)
            return self._train()
        finally:
            self.files.close()

    def _train(self) -> Result:
        if self.files.finished:
            load_state(self.bare, self.files.model)
            return self._result(already_finished=True)
        self.bare.to(self.accelerator.device)
        optimizer = build_optimizer(self.config, self.algorithm, self.bare)
        self.model, self.optimizer = self.accelerator.prepare(self.algorithm.wrap(self.bare), optimizer)
        self.algorithm.start(self.bare, self.total_steps, self.steps_per_epoch, self.config.run.epochs)
        self._load_checkpoint()
        with self.display:
            while self.epoch < self.config.run.epochs:
                self._train_epoch()
            self._finish()
        return self._result()

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.epoch * self.steps_per_epoch + self.step_in_epoch

    def _open_folder(self, resume: bool) -> None:
        """On the main process; its verdict is every process's."""
        verdict: list[Any] = [None, []]
        if self.main:
            try:
                verdict[1] = self.files.open(self.config, self.accelerator.num_processes, resume)
            except UserError as error:
                verdict[0] = str(error)
        broadcast_object_list(verdict)
        if verdict[0] is not None:
            raise UserError(verdict[0])
        for note in verdict[1]:
            self.display.message(f"note: {note}")

    def _train_epoch(self) -> None:
        config = self.config
        started = time.monotonic()
        self.model.train()
        batches = train_batches(
            self.data.train,
            config.data.batch_size,
            config.run.seed,
            self.epoch,
            self.step_in_epoch,
            self.accelerator.process_index,
            self.accelerator.num_processes,
        )
        for inputs, targets in batches:
            self._train_step(inputs, targets)
            self.step_in_epoch += 1
            self.display.step(self.step, self.total_steps)
            due = config.run.checkpoint_steps and self.step % config.run.checkpoint_steps == 0
            if due and self.step_in_epoch < self.steps_per_epoch:  # the end of the epoch has its own
                self._save_checkpoint()
        seed_everything(derive_seed(config.run.seed, "epoch", self.epoch))
        self.algorithm.after_epoch(self.bare, self.epoch)
        self._end_epoch(time.monotonic() - started)

    def _train_step(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        seed, step, device = self.config.run.seed, self.step, self.accelerator.device
        inputs, targets = inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        factor = lr_factor(self.config.schedule, step, self.steps_per_epoch, self.config.run.epochs)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        seed_everything(derive_seed(seed, "step", step))
        self.algorithm.before_batch(self.bare, step)
        seed_everything(derive_seed(seed, "step", step, self.accelerator.process_index))
        loss, outputs = self._backward_passes(inputs, targets)
        self.accelerator.unscale_gradients(self.optimizer)
        self.algorithm.before_step(self.bare)
        self.optimizer.step()
        self.optimizer.zero_grad()
        correct = (outputs.argmax(1) == targets).sum()
        self.sums += torch.stack([loss * len(targets), correct.double()])

    def _backward_passes(self, inputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(sum of the losses, outputs of the last pass). Gradients add up; processes share them once, in the last."""
        total = self.sums.new_zeros(())
        last = self.algorithm.passes - 1
        for index in range(last + 1):
            with nullcontext() if index == last else self.accelerator.no_sync(self.model):
                self.algorithm.before_pass(self.bare, index)
                loss, outputs = self.algorithm.loss(self.model, inputs, targets, self._criterion)
                self.accelerator.backward(loss)
            total += loss.detach()
        return total, outputs.detach()

    def _criterion(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(outputs, targets, label_smoothing=self.config.run.label_smoothing)

    def _end_epoch(self, seconds: float) -> None:
        """Evaluate, write the line of metrics, go on to the next epoch, write the checkpoint."""
        config = self.config
        seen = self.steps_per_epoch * config.data.batch_size
        loss, correct = (self._all_sums() / seen).tolist()
        if not math.isfinite(loss):
            raise UserError(f"training diverged in epoch {self.epoch + 1}: the loss is {loss}; lower optimizer.lr")
        lr = self.optimizer.param_groups[0]["lr"]
        self.epoch, self.step_in_epoch = self.epoch + 1, 0
        self.sums.zero_()
        last = self.epoch == config.run.epochs
        line = {"kind": "epoch", "epoch": self.epoch, "step": self.step, "lr": lr}
        line |= {"train_loss": loss, "train_accuracy": correct, "seconds": round(seconds, 3)}
        if last or self.epoch % config.run.eval_epochs == 0:
            line |= self._evaluate()
        self._write_line(line)
        if last or self.epoch % config.run.checkpoint_epochs == 0:
            self._save_checkpoint()

    def _finish(self) -> None:
        """Calibration, hard selection, the final evaluation, and the model's file, which marks the run as finished."""
        seed_everything(derive_seed(self.config.run.seed, "finish"))
        if self.algorithm.calibration_batches:
            self._share_buffers()
            self.algorithm.calibrate(self.bare, self._calibration_inputs)
        self.algorithm.finish(self.bare)
        line = {"kind": "final", "epoch": self.epoch, "step": self.step} | self._evaluate()
        self._write_line(line | {"results": self.algorithm.results(self.bare, self._evaluate)})
        if self.main:
            self.files.write_model(self.bare)
        self.accelerator.wait_for_everyone()

    def _calibration_inputs(self) -> Iterator[torch.Tensor]:
        """Whole batches of an epoch that the training did not come to, in its order and with its augmentation."""
        config = self.config
        batches = train_batches(self.data.train, config.data.batch_size, config.run.seed, self.epoch)
        for inputs, _ in islice(batches, self.algorithm.calibration_batches):
            yield inputs.to(self.accelerator.device)

    def _evaluate(self) -> dict[str, float]:
        """Loss, top-1 and top-5 accuracy on the test split, the work shared by the processes."""
        self._share_buffers()
        self.bare.eval()
        sums = torch.zeros(3, dtype=torch.float64, device=self.accelerator.device)
        split, size = self.data.test, self.config.data.eval_batch_size
        mine = eval_batches(split, size, self.accelerator.process_index, self.accelerator.num_processes)
        with torch.no_grad():
            for inputs, targets in mine:
                inputs, targets = inputs.to(sums.device), targets.to(sums.device)
                outputs = self.bare(inputs).float()
                loss = F.cross_entropy(outputs, targets, reduction="sum")
                right = outputs.argmax(1) == targets
                best = outputs.topk(min(5, outputs.shape[1])).indices == targets[:, None]
                sums += torch.stack([loss.double(), right.sum().double(), best.sum().double()])
        self.bare.train()
        loss, correct, top5 = (self.accelerator.reduce(sums, "sum") / len(split.labels)).tolist()
        return {"eval_loss": loss, "eval_accuracy": correct, "eval_top5": top5}

    def _share_buffers(self) -> None:
        """Give all processes the main one's running statistics, as a forward in training does."""
        if self.accelerator.num_processes > 1:
            for buffer in self.bare.buffers():
                broadcast(buffer)

    def _all_sums(self) -> torch.Tensor:
        return self.accelerator.reduce(self.sums, "sum")

    def _write_line(self, line: dict[str, Any]) -> None:
        line["algorithm"] = self.algorithm.metrics(self.bare)
        if self.main:
            self.files.append_metrics(line)
        self.display.metrics(line, self.config.run.epochs)

    def _save_checkpoint(self) -> None:
        """Of the main process: what differs on others is shared before it is used."""
        sums = self._all_sums()
        if not self.main:
            return
        scaler = self.accelerator.scaler
        state = {
            "epoch": self.epoch,
            "step_in_epoch": self.step_in_epoch,
            "sums": sums,
            "metrics_size": self.files.metrics_size(),
            "model": self.bare.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else {},
            "algorithm": self.algorithm.state_dict(),
        }
        checkpoint.save(self.files.path, self.step, state)

    def _load_checkpoint(self) -> None:
        """Continue from the newest good checkpoint; without one, from the beginning."""
        state = checkpoint.load_latest(self.files.path, lambda text: self.display.message(f"note: {text}"))
        if state is None:
            if self.main:
                self.files.truncate_metrics(0)
            return
        self.epoch, self.step_in_epoch = state["epoch"], state["step_in_epoch"]
        if self.main:
            self.sums.copy_(state["sums"])
            self.files.truncate_metrics(state["metrics_size"])
        self.bare.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.algorithm.load_state_dict(state["algorithm"])
        self.display.message(f"resumed at epoch {self.epoch + 1}, step {self.step} of {self.total_steps}")

    def _result(self, already_finished: bool = False) -> Result:
        model = self.accelerator.unwrap_model(self.bare, keep_fp32_wrapper=False)
        metrics = self.files.read_metrics()
        return Result(model.cpu().eval(), self.data, self.files.path, metrics, already_finished)
