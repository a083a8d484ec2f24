"""Whole networks on a GPU: packed ResNet-18 against bf16 with torch.compile, and training steps with DQA weights.

    python -m benchmarks.gpu_networks --out FILE [--seconds 420]     ImageNet's and CIFAR's ResNet-18, as JSON
    python -m benchmarks.gpu_networks --out FILE --quick             small images, without torch.compile; on the CPU

Inference is replayed from a CUDA graph, ours and theirs, so that it is the device's time (benchmarks/device.py);
``launched_seconds`` is that of a call without a graph. bf16 travels between layers, channels_last: each packed layer
encodes its input and gives bf16 again. Training is timed by steps in turns, waiting for the device after several of
them. Each packed layer's output is held against the CPU's for the same input, to the bit; the loss of a training step
against that of the plain formulation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from math import isfinite
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.compare import OURS
from benchmarks.contestants import dqa_resnet, float_resnet, packed_resnet, plain_dqa_resnet
from benchmarks.device import Record, Run, draw, main
from benchmarks.goals import Within, figure, judged
from benchmarks.gpu_problems import Format
from benchmarks.workloads import DQA_BITS, GPU_NETWORK_BATCHES, GPU_TRAINING_BATCH
from quantkernels.nn import PackedLayer

FLOAT, PLAIN = "torch bf16", "plain DQA"
COMPILED = ", compiled"
FORMATS = (Format(4, 8), Format(2, 2), Format(8, 8))
STEPS, ROUNDS = 10, 5  # of training that are timed together, and how often
QUICK_WIDTH = 0.125  # of the networks, to try the code
TRAINING_GOAL = 1.15  # times the float step
LOSS_BOUND = 0.02  # of the loss: two networks in bf16, whose sums are added in different orders


class Networks(Record):
    """A training step, and inference by batch."""

    @property
    def width(self) -> float:
        """Of the networks."""
        return QUICK_WIDTH if self.quick else 1.0

    def go(self) -> None:
        """The training step first, which has a goal; compiling those takes longest, and comes last."""
        torch.backends.cudnn.benchmark = True
        self.attempt("resnet18-train-dqa", self.train)
        for batch in (2,) if self.quick else GPU_NETWORK_BATCHES:
            rivals: dict[str, Any] = {"seconds": {}, "launched_seconds": {}}
            self.attempt(f"resnet18-b{batch}, rivals", partial(self.infer_floats, batch, rivals))
            for of in FORMATS[:1] if self.quick else FORMATS:
                self.attempt(f"resnet18-{of.name}-b{batch}", partial(self.infer, batch, of, rivals))
        if not self.quick and "seconds" in self.results.get("resnet18-train-dqa", {}):
            self.attempt("resnet18-train-dqa, compiled", self.train_compiled)

    def images(self, batch: int, size: int) -> Tensor:
        """Normal random ones, float32, channels_last."""
        images = torch.randn(batch, 3, size, size, generator=draw(0, self.device), device=self.device)
        return images.contiguous(memory_format=torch.channels_last)

    # ---- inference ----

    def image(self, batch: int) -> Tensor:
        """What a network sees."""
        return self.images(batch, 32 if self.quick else 224).to(torch.bfloat16)

    def on_device(self, model: nn.Module) -> nn.Module:
        """In bf16, channels_last."""
        return model.eval().to(self.device, torch.bfloat16).to(memory_format=torch.channels_last)

    def infer_floats(self, batch: int, found: dict[str, Any]) -> None:
        """The float network, as it is and compiled."""
        model, image = self.on_device(float_resnet("imagenet", self.width)), self.image(batch)
        self.time_forms(f"resnet18-b{batch}", [FLOAT, FLOAT + COMPILED], model, image, found)

    def infer(self, batch: int, of: Format, rivals: Mapping[str, Mapping[str, float]]) -> None:
        """A packed network, as it is and compiled."""
        model, image = self.on_device(packed_resnet(*of, self.width)), self.image(batch)
        entry: dict[str, Any] = {
            "family": "end_to_end",
            "job": "ResNet-18 inference, packed",
            "shape": list(image.shape),
            "w_bits": of.w_bits,
            "a_bits": of.a_bits,
            "seconds": {},
            "launched_seconds": {},
            "goals": [],
        }
        name = f"resnet18-{of.name}-b{batch}"
        self.results[name] = entry
        wrong, layers = differing_layers(model, image[:2])
        if wrong:
            entry["wrong"] = f"{wrong} of {layers} packed layers do not give what the CPU gives"
            return
        entry["compared"] = layers
        self.time_forms(name, [OURS, OURS + COMPILED] if of == FORMATS[0] else [OURS], model, image, entry)
        for key, values in rivals.items():
            entry[key] |= values

    def time_forms(
        self, job: str, names: Sequence[str], model: nn.Module, image: Tensor, found: dict[str, Any]
    ) -> None:
        """A model as it is, and compiled anew where the name says so."""
        for name in names:
            if self.quick and name.endswith(COMPILED):
                continue
            self.attempt(f"{job}, {name}", partial(self.time_inference, job, name, model, image, found))

    def time_inference(self, job: str, name: str, model: nn.Module, image: Tensor, found: dict[str, Any]) -> None:
        """With a graph and without."""
        function: Callable[[Tensor], Tensor] = model
        if name.endswith(COMPILED):
            torch.compiler.reset()
            function = torch.compile(model, dynamic=False)

        def run() -> Tensor:
            with torch.no_grad():
                return function(image)

        launched = self.timed(f"{job}, {name}, launched", [run])
        if launched is None:
            return
        found["launched_seconds"][name] = figure(launched)
        seconds = self.timed(f"{job}, {name}", [captured(run, self.device)])
        if seconds is not None:
            found["seconds"][name] = figure(seconds)

    # ---- training ----

    def train(self) -> None:
        """Forward, backward and SGD step under autocast."""
        images, labels = self.examples()
        entry: dict[str, Any] = {
            "family": "end_to_end",
            "job": "ResNet-18 training step, DQA weights",
            "shape": list(images.shape),
            "seconds": {},
            "goals": [],
        }
        self.results["resnet18-train-dqa"] = entry
        width = self.width
        models = {OURS: dqa_resnet(DQA_BITS, width), FLOAT: float_resnet("cifar", width)}
        models[PLAIN] = plain_dqa_resnet(DQA_BITS, width)
        steps = {name: self.step(model, images, labels) for name, model in models.items()}
        losses = {name: float(step()) for name, step in steps.items()}
        entry["losses"] = {name: figure(loss) for name, loss in losses.items()}
        if not isfinite(losses[OURS]) or abs(losses[OURS] - losses[PLAIN]) > LOSS_BOUND * losses[PLAIN]:
            entry["wrong"] = f"the loss is {losses[OURS]}, that of the plain formulation {losses[PLAIN]}"
            return
        entry["seconds"] = self.in_turns(steps)
        if not self.quick:
            entry["goals"] = judged([Within(FLOAT, TRAINING_GOAL)], entry, self.limits)

    def train_compiled(self) -> None:
        """Both networks compiled."""
        images, labels = self.examples()
        models = {OURS: dqa_resnet(DQA_BITS), FLOAT: float_resnet("cifar")}
        steps = {name + COMPILED: self.step(model, images, labels, True) for name, model in models.items()}
        self.results["resnet18-train-dqa"]["seconds"] |= self.in_turns(steps)

    def examples(self) -> tuple[Tensor, Tensor]:
        """Images and labels."""
        batch = 4 if self.quick else GPU_TRAINING_BATCH
        return self.images(batch, 32), torch.arange(batch, device=self.device) % 10

    def step(self, model: nn.Module, images: Tensor, labels: Tensor, compiled: bool = False) -> Run:
        """A training step, which gives the loss."""
        model = model.train().to(self.device).to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        forward = torch.compile(model, dynamic=False) if compiled else model

        def run() -> Tensor:
            optimizer.zero_grad()
            with torch.autocast(self.device, torch.bfloat16):
                loss = functional.cross_entropy(forward(images), labels)
            loss.backward()
            optimizer.step()
            return loss.detach()

        return run

    def in_turns(self, steps: Mapping[str, Run]) -> dict[str, float]:
        """Median seconds of a step, some of each contestant after the other, until the device is done with them."""
        count, rounds = (1, 1) if self.quick else (STEPS, ROUNDS)
        times: dict[str, list[float]] = {name: [] for name in steps}
        for i in range(rounds + 1):  # the first round warms up
            for name, step in steps.items():
                begin = perf_counter()
                for _ in range(count):
                    step()
                if self.device == "cuda":
                    torch.cuda.synchronize()
                if i > 0:
                    times[name].append((perf_counter() - begin) / count)
        return {name: figure(median(values)) for name, values in times.items()}

    def lines(self) -> Iterator[str]:
        """A row a job, and the goals last."""
        for name, entry in self.results.items():
            if "wrong" in entry:
                yield f"{name:<30} WRONG: {entry['wrong']}"
                continue
            for key in ("seconds", "launched_seconds"):
                times = entry.get(key, {})
                text = "  ".join(f"{who} {1e3 * seconds:.3f} ms" for who, seconds in times.items())
                if text:
                    yield f"{name:<30} {key.replace('_', ' ') + ':':<18}{text}"
        yield from self.goal_lines()


def captured(run: Run, device: str) -> Run:
    """The call as the replay of a CUDA graph."""
    if device != "cuda":
        return run
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def differing_layers(model: nn.Module, image: Tensor) -> tuple[int, int]:
    """Packed layers whose output is not, to the bit, what the CPU gives for the same input, and how many there are."""
    results: list[bool] = []

    def compare(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        device = output.device
        results.append(torch.equal(layer.cpu().forward(inputs[0].cpu()), output.cpu()))  # forward: no hook again
        layer.to(device)

    packed = [layer for layer in model.modules() if isinstance(layer, PackedLayer)]
    hooks = [layer.register_forward_hook(compare) for layer in packed]
    try:
        with torch.no_grad():
            model(image)
    finally:
        for hook in hooks:
            hook.remove()
    return results.count(False), len(packed)


if __name__ == "__main__":
    main(Networks, __doc__)
