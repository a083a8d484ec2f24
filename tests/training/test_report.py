"""Plots and reports: what they show of good, unfinished, damaged and missing runs."""

import json
import re

import numpy as np
import pytest
import torch
from torch import nn

import quantkernels as qk
from training import plots
from training.config import load
from training.report import mean_and_range, runs_table, write_report
from training.run_reader import group_by_settings, read_run

RECIPE = "dqa/table1/cifar10-resnet18-minmax-dqa"


def make_run(folder, recipe=RECIPE, seed=0, epochs=4, accuracy=0.9, final=True):
    """A run's folder as the engine writes it, without training."""
    folder.mkdir()
    config = load(recipe, [f"run.seed={seed}", f"run.epochs={epochs}"])
    about = {"recipe": config.to_tables(), "versions": {"torch": "2"}, "processes": 1}
    (folder / "config.json").write_text(json.dumps(about))
    lines = []
    for epoch in range(1, epochs + 1):
        low = epoch / epochs
        attention = {"conv1.weight_quantizer": [low, 1 - low, 0.0], "fc.weight_quantizer": [0.8, 0.1, 0.1]}
        algorithm = {"attention": attention} if "dqa" in recipe.rpartition("-")[2] else {}
        line = {
            "kind": "epoch",
            "epoch": epoch,
            "train_accuracy": low / 2,
            "seconds": 30.0,
            "algorithm": algorithm,
        }
        lines.append({**line, "eval_accuracy": accuracy * epoch / epochs})
    if final:
        lines.append({"kind": "final", "epoch": epochs, "eval_accuracy": accuracy, "algorithm": {}})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_report_of_several_seeds(tmp_path):
    runs = [make_run(tmp_path / str(seed), seed=seed, accuracy=0.9 + seed / 100) for seed in range(3)]
    runs.append(make_run(tmp_path / "float", "dqa/table1/cifar10-resnet18-float", accuracy=0.95))
    out = write_report(runs, tmp_path / "sub" / "report.html")
    page = out.read_text()
    assert '<td>91.00 (90.00 to 92.00)</td><td>1.00</td><td>94.8</td><td class="text">DQA table 1</td>' in page
    assert f'<td class="text">{RECIPE}</td><td>3</td><td>4</td>' in page
    assert page.count("<img ") == 3  # two accuracies, attention
    assert not re.search(r'(src|href)="(?!data:)', page), "the page must not fetch anything"
    assert "1 of 2 mixtures had less than 0.99" in page
    assert "fc.weight_quantizer" in page
    assert "optimizer.lr" in page
    assert 'class="notes"' not in page


def test_unfinished_damaged_and_missing_runs_are_named(tmp_path):
    unfinished = make_run(tmp_path / "unfinished", final=False)
    damaged = make_run(tmp_path / "damaged", seed=1)
    with open(damaged / "metrics.jsonl", "a") as file:
        file.write('{"kind": "epo\n[1]\n')
    no_config = make_run(tmp_path / "no_config", seed=2)
    (no_config / "config.json").write_text("{")
    empty = tmp_path / "empty"
    empty.mkdir()
    page = write_report([unfinished, damaged, no_config, empty, tmp_path / "none"], tmp_path / "r.html").read_text()
    assert f"{unfinished}: not finished: 4 of 4 epochs are on record" in page
    assert f"{damaged}: metrics.jsonl: 2 of 7 lines are damaged (line 6, 7)" in page
    assert f"{no_config}: config.json cannot be read" in page
    assert f"{empty}: metrics.jsonl cannot be read" in page
    assert f"{tmp_path / 'none'}: there is no such folder" in page


def test_a_run_without_a_finished_epoch(tmp_path):
    page = write_report([make_run(tmp_path / "a", epochs=1, final=False)], tmp_path / "r.html").read_text()
    (tmp_path / "a" / "metrics.jsonl").write_text("")
    page = write_report([tmp_path / "a"], tmp_path / "r.html").read_text()
    assert "No run has a finished epoch" in page


def test_names_are_escaped(tmp_path):
    folder = make_run(tmp_path / "a")
    about = json.loads((folder / "config.json").read_text())
    about["recipe"]["run"]["name"] = "<script>x</script>"
    (folder / "config.json").write_text(json.dumps(about))
    assert "<script>" not in write_report([folder], tmp_path / "r.html").read_text()


def test_no_folders_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="at least one folder"):
        write_report([], tmp_path / "r.html")


def test_runs_with_other_settings_are_not_one_group(tmp_path):
    runs = [read_run(make_run(tmp_path / str(n), epochs=n)) for n in (2, 3)]
    groups = group_by_settings(runs)
    assert [len(group) for group in groups.values()] == [1, 1]
    assert [row[2] for row in runs_table(groups)[1]] == ["2", "3"]


def test_mean_and_range():
    assert mean_and_range([]) == "-"
    assert mean_and_range([1.0]) == "1.00"
    assert mean_and_range([1.0, 3.0], 1) == "2.0 (1.0 to 3.0)"


def test_quantization_error_is_smaller_with_dqa_at_every_temperature():
    x = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    relax, dqa = (line.get_ydata() for line in plots.figure_quantization_error(x, points=20).axes[0].lines[1:])
    alone = float((qk.MinMax(2)(x) - x).abs().mean())
    assert relax[0] == pytest.approx(alone / 2, rel=0.02)  # hot: the average of the quantized and the float value
    assert relax[-1] == pytest.approx(alone, rel=1e-3)
    assert (dqa <= relax + 1e-6).all()


def test_attention_figure():
    quantizers = [qk.MinMax(2), qk.MinMax(4)]
    figure = plots.figure_attention([1, 2, 3], [[0.5, 0.5], [0.7, 0.3], [1, 0]], ["two", "four"], quantizers)
    left, right = figure.axes
    assert [line.get_label() for line in left.lines] == ["two", "four"]
    final = right.lines[-1]
    x = torch.linspace(-1, 1, 2001)
    np.testing.assert_allclose(final.get_ydata(), qk.MinMax(2)(x).numpy(), atol=1e-6)
    with pytest.raises(ValueError, match=r"attention must be \[1, 2\]"):
        plots.figure_attention([1], [[1.0]], ["two", "four"])


def test_loss_surface_leaves_the_model_alone_and_is_the_loss_at_its_centre():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    inputs, targets = torch.randn(32, 1, 4, 4), torch.randint(0, 3, (32,))
    surface = plots.loss_surface(model, inputs, targets, points=5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    expected = nn.functional.cross_entropy(model.train()(inputs), targets).item()
    assert surface.shape == (5, 5)
    assert surface[2, 2] == pytest.approx(expected, rel=1e-6)
    assert plots.figure_loss_surface({"float32": surface, "again": surface}).axes


def test_directions_have_the_norm_of_the_filters_they_move():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))
    direction = plots.filter_normalised_direction(model, seed=1)
    assert list(direction) == ["0.weight"]
    norms = direction["0.weight"].flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, model[0].weight.detach().flatten(1).norm(dim=1))


def test_roughness():
    steps = np.linspace(-1, 1, 9)
    plane = steps[:, None] + 2 * steps[None, :]
    assert plots.roughness(plane) == pytest.approx(0, abs=1e-12)
    assert plots.roughness(np.zeros((4, 4))) == 0
    noise = np.random.default_rng(0).normal(size=(9, 9))
    assert plots.roughness(plane + noise) > plots.roughness(plane + 0.1 * noise) > 0


def test_learning_curves_show_mean_and_range_over_seeds():
    figure = plots.figure_learning_curves({"a": [([1, 2], [0.1, 0.2]), ([1], [0.3])]}, "accuracy (%)", percent=True)
    (line,) = figure.axes[0].lines
    assert line.get_label() == "a (2 seeds)"
    np.testing.assert_allclose(line.get_ydata(), [20, 20])
    assert plots.figure_learning_curves({}, "accuracy").axes


def test_accuracy_at_every_bit_width_and_the_teachers(tmp_path):
    runs = []
    for seed, accuracy in ((0, 90.0), (1, 92.0)):
        folder = make_run(tmp_path / str(seed), seed=seed, final=False)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for line in lines:
            line["algorithm"] = {"teachers": {"4": {"8": 5}, "2": {"8": 1, "4": 3}}}
        lines.append({"kind": "final", "epoch": 4, "eval_accuracy": 0.9, "results": {"4 bits": accuracy, "2 bits": 80}})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        runs.append(folder)
    runs.append(make_run(tmp_path / "other", "dqa/table1/cifar10-resnet18-float"))
    page = write_report(runs, tmp_path / "r.html").read_text()
    assert "<th>4 bits</th><th>2 bits</th>" in page
    assert "<td>91.00 (90.00 to 92.00)</td><td>80.00 (80.00 to 80.00)</td>" in page
    assert "by 8: 25.0 %, 4: 75.0 %" in page and "by 8: 100.0 %" in page
    assert "Results" not in write_report(runs[2:], tmp_path / "r.html").read_text()


def test_bits_of_the_layers(tmp_path):
    folder = make_run(tmp_path / "run", "limpq/table1/limpq", epochs=1)
    bits = {"layer1.0.conv1": [4, 3], "layer1.0.conv2": [2, 32]}
    final = {"kind": "final", "epoch": 1, "eval_accuracy": 0.769, "eval_top5": 0.9, "algorithm": {"bits": bits}}
    final["results"] = {"size MB": 7.97, "search s": 0.4}
    lines = (folder / "metrics.jsonl").read_text().splitlines()[:-1]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, json.dumps(final)]) + "\n")
    page = write_report([folder], tmp_path / "report.html").read_text()
    assert "Bits of the layers" in page and "limpq/table1/limpq: bits of every layer" in page
    assert "<td>7.97</td><td>0.40</td>" in page
    figure = plots.figure_bits(read_run(folder).bits())
    heights = [[bar.get_height() for bar in bars] for bars in figure.axes[0].containers]
    np.testing.assert_equal(heights, [[4, 2], [3, np.nan]])
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == list(bits)


def test_a_run_without_bits_of_its_layers_has_no_such_section(tmp_path):
    page = write_report([make_run(tmp_path / "run")], tmp_path / "report.html").read_text()
    assert "Bits of the layers" not in page


def test_hours_count_processes_and_the_stages_before(tmp_path):
    """LIMPQ's table 2: the indicators and the search of a policy are part of its cost."""
    folder = make_run(tmp_path / "run")  # 4 epochs of 30 s
    assert read_run(folder).figures["GPU-hours"] == pytest.approx(120 / 3600)
    about = json.loads((folder / "config.json").read_text()) | {"processes": 8}
    (folder / "config.json").write_text(json.dumps(about))
    *lines, final = (folder / "metrics.jsonl").read_text().splitlines()
    final = json.loads(final) | {"results": {"indicators s": 50.0, "search s": 9.0, "size MB": 8.0}}
    (folder / "metrics.jsonl").write_text("\n".join([*lines, json.dumps(final)]) + "\n")
    assert read_run(folder).figures["GPU-hours"] == pytest.approx((8 * 170 + 9) / 3600)
