"""The demo (``python -m training.demo``): train 2-bit networks on digits, pack them, compare, write a report.

Five methods over three seeds with the recipes of ``training/recipes/digits``; then the network of the first
seed of each method is packed, saved, loaded again and compared with the trained one in eval mode. Exits with
status 1 if a packed network disagrees with its trained one on any test image.
"""

from __future__ import annotations

import argparse
import copy
import shutil
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import quantkernels as qk
from training import engine, plots
from training.config import Config, load
from training.data import load_data
from training.data.loader import eval_batches
from training.models import build_model
from training.report import write_report

METHODS = {
    "float": "digits/float",
    "W2 min-max": "digits/minmax",
    "W2 Binary-Relax": "digits/binary-relax",
    "W2 DQA 2/4/8": "digits/dqa",
    "W2A2": "digits/minmax-pact",
}
LATENCY_BATCH = 32
LATENCY_REPEATS = 30
SURFACE_POINTS = 17


@dataclass
class Packed:
    """A packed network against its trained one, on the whole test set."""

    bytes: int
    difference: float  # largest absolute difference of logits, batch-norm apart
    folded_difference: float  # the same for the file that was saved and loaded, batch-norm folded
    agreement: float  # share of test images with the same top-1 class, the smaller of both
    trained_latency: float  # seconds for a batch
    latency: float


def train(out: Path, seeds: int, overrides: list[str], console: Console) -> dict[str, list[engine.Result]]:
    """Every method with every seed, through the engine."""
    results: dict[str, list[engine.Result]] = {}
    for method, recipe in METHODS.items():
        for seed in range(seeds):
            config = load(recipe, [f"run.seed={seed}", *overrides])
            started = time.perf_counter()
            result = engine.run(config, out / "runs" / config.run.name)
            seconds = time.perf_counter() - started
            console.print(f"{config.run.name:30} {100 * result.accuracy:6.2f} %  {seconds:5.1f} s", highlight=False)
            results.setdefault(method, []).append(result)
    return results


def evaluation_set(result: engine.Result) -> tuple[Tensor, Tensor]:
    """All test images and labels of a run, as the network gets them."""
    batches = list(eval_batches(result.data.test, len(result.data.test.labels)))
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


def latency(model: nn.Module, inputs: Tensor) -> float:
    """Median seconds of a forward pass."""
    times = []
    with torch.no_grad():
        for _ in range(LATENCY_REPEATS + 3):
            started = time.perf_counter()
            model(inputs)
            times.append(time.perf_counter() - started)
    return statistics.median(times[3:])


def pack(config: Config, result: engine.Result, file: Path) -> Packed:
    """Convert, save and load the trained network of a run; compare it with the trained one."""
    images, _ = evaluation_set(result)
    trained = result.model.eval()
    plain = qk.convert(trained, fold=False)
    qk.save(qk.convert(trained, fold=True), file)
    blank = build_model(
        config.model.name, result.data.num_classes, in_channels=result.data.channels, **config.model.options
    )
    loaded = qk.load(file, blank).eval()
    with torch.no_grad():
        expected, *given = (model(images) for model in (trained, plain, loaded))
    same = [(logits.argmax(1) == expected.argmax(1)).float().mean().item() for logits in given]
    differences = [(logits - expected).abs().max().item() for logits in given]
    batch = images[:LATENCY_BATCH]
    return Packed(file.stat().st_size, *differences, min(same), latency(trained, batch), latency(loaded, batch))


# column of the printed table -> what the report adds to it
COLUMNS = {
    "method": "",
    "accuracy %": "mean and standard deviation over the seeds",
    "kB": "of the file: float32 state dict, or packed",
    "logits": "largest difference of packed and trained logits, batch-norm apart",
    "folded": "the same of the saved and loaded file, batch-norm folded",
    "top-1": "test images that packed and trained network give the same class",
    "ms": f"for {LATENCY_BATCH} images, trained network in eval mode",
    "packed": "the same, packed network",
}
COLUMNS_EXPLAINED = (["column", "meaning"], [[name, text] for name, text in COLUMNS.items() if text])


def row(method: str, runs: list[engine.Result], packed: Packed | None) -> list[str]:
    """A method's line of the table: accuracy, and what packing its first network gives."""
    accuracies = [100 * run.accuracy for run in runs]
    accuracy = f"{statistics.fmean(accuracies):.2f}"
    if len(accuracies) > 1:
        accuracy += f" ± {statistics.stdev(accuracies):.2f}"
    if packed is None:
        size = (runs[0].folder / "model.safetensors").stat().st_size
        seconds = latency(runs[0].model, evaluation_set(runs[0])[0][:LATENCY_BATCH])
        return [method, accuracy, f"{size / 1e3:.1f}", "-", "-", "-", f"{1000 * seconds:.2f}", "-"]
    differences = [f"{value:.0e}" if value else "0" for value in (packed.difference, packed.folded_difference)]
    times = [f"{1000 * seconds:.2f}" for seconds in (packed.trained_latency, packed.latency)]
    return [method, accuracy, f"{packed.bytes / 1e3:.1f}", *differences, f"{100 * packed.agreement:g} %", *times]


def surfaces() -> Figure:
    """Figure 4 on the digits' network as it is before training."""
    config = load("digits/float")
    data = load_data(config.data)
    inputs, targets = next(iter(eval_batches(data.test, 256)))
    torch.manual_seed(0)
    model = build_model(config.model.name, data.num_classes, in_channels=data.channels, **config.model.options)
    mixed = qk.Attention([qk.MinMax(2), qk.MinMax(4), qk.MinMax(8)])
    networks = {
        "float32": model,
        "2-bit weights": qk.prepare(copy.deepcopy(model), weight=qk.MinMax(2)),
        "2, 4 and 8 bits mixed": qk.prepare(copy.deepcopy(model), weight=mixed),
    }
    losses = {
        name: plots.loss_surface(network, inputs, targets, points=SURFACE_POINTS) for name, network in networks.items()
    }
    return plots.figure_loss_surface(losses)


def show(rows: list[list[str]], console: Console) -> None:
    """Print the table."""
    caption = "\n".join(f"{name}: {text}" for name, text in COLUMNS.items() if text)
    view = Table(title="2-bit networks on digits", caption=caption, caption_justify="left", box=box.SIMPLE_HEAD)
    view.collapse_padding, view.pad_edge = True, False  # it fits 80 columns
    for i, name in enumerate(COLUMNS):
        view.add_column(name, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        view.add_row(*row)
    console.print(view)


def main(arguments: list[str] | None = None) -> int:
    """Run the demo; 0 if every packed network agrees with its trained one, else 1."""
    parser = argparse.ArgumentParser(prog="python -m training.demo", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("demo-report"), help="folder of the report and the runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="TABLE.KEY=VALUE", dest="overrides")
    options = parser.parse_args(arguments)
    console = Console()
    shutil.rmtree(options.out / "runs", ignore_errors=True)
    started = time.perf_counter()
    results = train(options.out, options.seeds, options.overrides, console)
    console.print(f"trained {options.seeds * len(METHODS)} networks in {time.perf_counter() - started:.0f} s")
    packed = {}
    for method, runs in results.items():
        if method != "float":
            config = load(METHODS[method], options.overrides)
            packed[method] = pack(config, runs[0], runs[0].folder / "packed.safetensors")
    rows = [row(method, runs, packed.get(method)) for method, runs in results.items()]
    show(rows, console)
    page = write_report(
        [run.folder for runs in results.values() for run in runs],
        options.out / "report.html",
        title="quantkernels demo: 2-bit networks on digits",
        tables={"Packed networks": (list(COLUMNS), rows), "Columns": COLUMNS_EXPLAINED},
        figures={
            "Figure 2 of the DQA paper: error of the mixtures while the temperature falls": (
                plots.figure_quantization_error()
            ),
            "Figure 4 of the DQA paper: loss along two random directions before training": (surfaces()),
        },
    )
    console.print(f"report: {page}")
    wrong = [method for method, p in packed.items() if p.agreement < 1]
    for method in wrong:
        console.print(f"error: {method}: the packed network gives other classes than the trained one")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
