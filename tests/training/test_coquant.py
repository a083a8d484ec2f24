"""CoQuant, AdaBits and switchable batch-norm: formulas, teachers, swaps, schedules, zero-shot widths, whole runs."""

from __future__ import annotations

import copy

import pytest
import torch
from residual import tiny_residual
from torch import nn
from torch.nn import functional as F

import quantkernels as qk
from quantkernels.nn import QuantizedLayer
from training import engine
from training.algorithms import coquant
from training.algorithms.adaptive import nearest_width, zero_shot
from training.algorithms.base import build_algorithm
from training.config import ConfigError, UserError
from training.models import build_model

BITS = [8, 6, 4, 2]


def prepared(name: str = "coquant", **options):
    """(algorithm, network, wrapped network) before the first batch of 10 epochs of 10 steps."""
    torch.manual_seed(4)
    algorithm = build_algorithm(name, {"bits": BITS, **options})
    network = algorithm.prepare(tiny_residual(10, 1))
    algorithm.start(network, 100, 10, 10)
    return algorithm, network, algorithm.wrap(network).train()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(16, 1, 8, 8, generator=generator), torch.arange(16) % 10


# --- schedules ---


def test_swap_probabilities():
    torch.testing.assert_close(coquant.keep_probabilities(0.5, 5, "depth"), torch.tensor([0.5, 0.625, 0.75, 0.875, 1]))
    assert coquant.keep_probabilities(0.5, 3, "uniform").tolist() == [0.5] * 3
    assert coquant.keep_probabilities(0.5, 3, "none").tolist() == [1] * 3
    assert coquant.keep_probabilities(0.5, 1, "depth").tolist() == [0.5]


def test_the_first_probability_grows_to_one_over_the_epochs():
    algorithm, *_ = prepared(p1=0.7)
    expected = [0.7 + 0.3 * epoch / 9 for epoch in range(10)]
    assert [algorithm.first_probability(10 * epoch + 3) for epoch in range(10)] == pytest.approx(expected)


def test_blocks_are_lent_as_often_as_the_probabilities_say():
    algorithm, network, _ = prepared(p1=0.4)
    torch.manual_seed(0)
    counts = torch.zeros(len(BITS), 3)
    for _ in range(2000):
        algorithm.before_batch(network, 0)
        counts += torch.tensor(algorithm.lent)
    torch.testing.assert_close(counts / 2000, torch.tensor([[0.6, 0.3, 0.0]]).expand(4, 3), atol=0.05, rtol=0)


# --- teachers ---


def choose(algorithm, logits, targets, apart=None) -> int:
    return int(algorithm._choose(len(logits), [torch.tensor(rows) for rows in logits], torch.tensor(targets), apart))


WRONG_BUT_SURE, RIGHT, UNSURE = [[9.0, 0.0]], [[0.0, 2.0]], [[0.0, 0.1]]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"confidence": "cross_entropy"}, 1),
        ({"confidence": "max_probability"}, 0),
        ({"confidence": "entropy"}, 0),
        ({"teacher": "fixed"}, 0),
        ({"teacher": "recursive"}, 2),
    ],
)
def test_teacher_choice(options, expected):
    algorithm, *_ = prepared(distance=0.0, **options)
    assert choose(algorithm, [WRONG_BUT_SURE, RIGHT, UNSURE], [1]) == expected
    assert algorithm.choices[3].tolist() == [int(t == expected) for t in range(4)]


def test_the_distance_decides_between_predictions_that_are_alike():
    apart = torch.zeros(4, 4)
    apart[3] = torch.tensor([3.0, 2.0, 1.0, 0.0])
    for distance, expected in ((0.0, 0), (0.01, 0), (1.0, 2)):
        algorithm, *_ = prepared(distance=distance)
        # cross-entropies 0.127, 0.313, 0.693: the first is better by 0.57, and 2 further away than the last
        assert choose(algorithm, [[[0.0, 2.0]], [[0.0, 1.0]], [[0.0, 0.0]]], [1], apart) == expected


def test_distances_are_the_sum_over_layers_of_norms():
    _, network, _ = prepared()
    found = coquant.distances(network, BITS)
    layers = [m for m in network.modules() if isinstance(m, QuantizedLayer)]
    assert len(layers) == 7  # two convolutions a block, and the strided block's shortcut
    for i, one in enumerate(BITS):
        for j, other in enumerate(BITS):
            norms = [(qk.ModifiedDoReFa(one)(m.weight) - qk.ModifiedDoReFa(other)(m.weight)).norm() for m in layers]
            torch.testing.assert_close(found[i, j], torch.stack(norms).sum().detach())
    assert {m.weight_quantizer.bits for m in layers} == {8}


def test_distillation_is_the_divergence_from_the_teacher():
    student, teacher = torch.randn(5, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    loss = coquant.distillation(student, teacher)
    p, q = teacher.softmax(1), student.softmax(1)
    torch.testing.assert_close(loss, (p * (p / q).log()).sum(1).mean())
    loss.backward()
    assert teacher.grad is None
    torch.testing.assert_close(student.grad, (q - p).detach() / 5)


# --- the step ---


def set_precisions(network: nn.Module, bits: int, lent: list[bool], teacher: int) -> None:
    qk.set_bits(network, bits)
    for block, swapped in zip(coquant.residual_blocks(network), lent, strict=True):
        if swapped:
            qk.set_bits(block, teacher)


def test_a_step_is_algorithm_1():
    """Against the algorithm written out, with every decision of the module taken over."""
    algorithm, network, joint = prepared(p1=0.3, swap="uniform")
    twin = copy.deepcopy(network).train()
    inputs, targets = batch()
    algorithm.before_batch(network, 0)
    loss, outputs = algorithm.loss(joint, inputs, targets, F.cross_entropy)
    loss.backward()

    apart = coquant.distances(twin, BITS)
    expected, seen, teachers = 0, [], []
    for i, bits in enumerate(BITS):
        if i == 0:
            set_precisions(twin, bits, [False] * 3, 0)
            seen.append(twin(inputs))
            expected = F.cross_entropy(seen[0], targets)
            continue
        scores = [F.cross_entropy(y, targets) + 1e-3 * apart[i, t] for t, y in enumerate(seen)]
        teachers.append(min(range(i), key=lambda t: float(scores[t].detach())))
        set_precisions(twin, bits, algorithm.lent[i], BITS[teachers[-1]])
        seen.append(twin(inputs))
        expected = expected + F.cross_entropy(seen[i], targets) + coquant.distillation(seen[i], seen[teachers[-1]])
    expected.backward()
    assert any(any(row) for row in algorithm.lent[1:])
    assert torch.equal(outputs, seen[0])
    torch.testing.assert_close(loss, expected)
    assert [row.index(1) for row in algorithm.choices[1:].tolist()] == teachers
    for (name, one), other in zip(network.named_parameters(), twin.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, msg=name)


def test_gradients_flow_through_lent_blocks():
    """With every block lent the students have nothing of their own left in them, and the teacher's learns for them."""
    algorithm, network, joint = prepared(p1=0.0, swap="uniform", teacher="fixed")
    inputs, targets = batch()
    algorithm.before_batch(network, 0)
    assert all(all(row) for row in algorithm.lent)
    algorithm.loss(joint, inputs, targets, F.cross_entropy)[0].backward()
    inside, stem = network[3].bn1.norms, network[1].norms
    assert inside["8"].weight.grad is not None and inside["2"].weight.grad is None
    assert stem["2"].weight.grad is not None
    alone, single, joint_alone = prepared(p1=0.0, swap="uniform", teacher="fixed")
    alone.bits = [8]
    alone.before_batch(single, 0)
    alone.loss(joint_alone, inputs, targets, F.cross_entropy)[0].backward()
    assert not torch.allclose(inside["8"].weight.grad, single[3].bn1.norms["8"].weight.grad)


def test_without_swaps_and_with_them_off_the_students_keep_their_blocks():
    algorithm, network, _ = prepared(swap="none")
    algorithm.before_batch(network, 0)
    assert not any(any(row) for row in algorithm.lent)
    assert not algorithm.unused_parameters


def test_joint_training_is_the_sum_of_cross_entropies():
    algorithm, network, joint = prepared("switchable_bn")
    inputs, targets = batch()
    twin = copy.deepcopy(network)
    loss, outputs = algorithm.loss(joint, inputs, targets, F.cross_entropy)
    logits = [qk.set_bits(twin, bits)(inputs) for bits in BITS]
    torch.testing.assert_close(loss, sum(F.cross_entropy(y, targets) for y in logits))
    assert torch.equal(outputs, logits[0])
    loss.backward()
    sum(F.cross_entropy(y, targets) for y in [qk.set_bits(twin, bits)(inputs) for bits in BITS]).backward()
    for one, other in zip(network.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_layers_and_groups():
    _, network, _ = prepared("adabits")
    assert type(network[0]) is nn.Conv2d
    last = network[-1]
    assert last.weight_quantizer.rescale and last.activation_quantizer.alpha.tolist() == [10.0] * 4
    assert not network[3].conv1.weight_quantizer.rescale
    assert network[3].conv1.activation_quantizer.alpha.tolist() == [8.0] * 4
    algorithm, network, _ = prepared(zero_shot=[3, 7], quantizer_lr=0.5, divide_lr=True, alpha=4.0)
    assert type(network[-1]) is nn.Linear
    assert network[3].conv1.activation_quantizer.per_bit == [8, 7, 6, 4, 3, 2]
    groups = algorithm.parameter_groups(network, {"lr": 0.1, "weight_decay": 1e-4})
    assert [group["lr"] for group in groups] == pytest.approx([0.1 / 4, 0.5 / 4])
    assert len(groups[1]["params"]) == 7
    idle = {name for name, p in network.named_parameters() if not p.requires_grad}
    assert idle and all(".norms.3." in name or ".norms.7." in name for name in idle)


# --- zero-shot bit-widths ---


def test_nearest_width():
    assert [nearest_width(bits, [8, 6, 4, 2]) for bits in (7, 5, 3, 1)] == [8, 6, 4, 2]
    assert [nearest_width(bits, [8, 2]) for bits in (6, 5, 4)] == [8, 8, 2]


def test_zero_shot():
    _, network, _ = prepared(zero_shot=[5])
    inputs, _ = batch()
    with torch.no_grad():
        for bits in BITS:
            qk.set_bits(network, bits).train()(inputs * bits)
        network[3].conv1.activation_quantizer.alpha.copy_(torch.tensor([8.0, 6.0, 5.0, 4.0, 2.0]))
    zero_shot(network, 5, BITS, [inputs])
    assert network[3].conv1.activation_quantizer.alpha.tolist() == [8, 6, 6, 4, 2]
    norm = network[1]
    assert norm.bits == 5
    torch.testing.assert_close(norm.current.running_mean, network[0](inputs).mean((0, 2, 3)))
    assert torch.equal(norm.current.weight, norm.norms["6"].weight)


# --- whole runs ---

RUNS = {
    "coquant": {
        "name": "coquant",
        "bits": [8, 4, 2],
        "zero_shot": [3],
        "calibration_batches": 2,
        "p1": 0.5,
        "swap": "uniform",
    },
    "fixed teacher": {"name": "coquant", "bits": [4, 2], "teacher": "fixed", "swap": "none"},
    "switchable_bn": {"name": "switchable_bn", "bits": [8, 4, 2], "zero_shot": [5, 3], "calibration_batches": 2},
    "adabits": {"name": "adabits", "bits": [4, 2], "weight": "CentredDoReFa"},
}


def residual_config(tiny, algorithm, **changes):
    """2 epochs of 4 steps, unless changed; the fifth step ends with a checkpoint."""
    changes = {"run": {"epochs": 2, "checkpoint_steps": 5}, "data": {"batch_size": 300}} | changes
    return tiny(model={"name": "tiny_residual"}, algorithm=algorithm, **changes)


@pytest.mark.parametrize("name", RUNS)
def test_results_are_of_every_bit_width(name, tiny, tmp_path):
    result = engine.run(residual_config(tiny, RUNS[name]), tmp_path / "run")
    widths = sorted([*RUNS[name]["bits"], *RUNS[name].get("zero_shot", [])], reverse=True)
    final = result.metrics[-1]
    assert list(final["results"]) == [f"{bits} bits" for bits in widths]
    assert final["results"][f"{widths[0]} bits"] == pytest.approx(100 * final["eval_accuracy"])
    if RUNS[name]["name"] == "coquant":
        for line in result.metrics:
            assert all(sum(counts.values()) == 4 for counts in line["algorithm"]["teachers"].values())


def test_trained_and_packed_agree_at_every_bit_width(tiny, tmp_path):
    config = residual_config(tiny, RUNS["coquant"])
    engine.run(config, tmp_path / "run")
    _, result = engine.load_run(tmp_path / "run")
    widths = [8, 4, 3, 2]
    packed = qk.convert(result.model, fold=False, bit_widths=widths)
    qk.save(packed, tmp_path / "net.safetensors")
    architecture = build_model("tiny_residual", 10, in_channels=1)
    loaded = qk.load(tmp_path / "net.safetensors", architecture)
    split = result.data.test
    inputs, targets = split.eval_batch(torch.arange(len(split.labels)))
    for bits in widths:
        with torch.no_grad():
            expected = qk.set_bits(result.model, bits)(inputs)
            assert torch.equal(qk.set_bits(loaded, bits)(inputs), expected)
        accuracy = 100 * (expected.argmax(1) == targets).double().mean().item()
        assert result.metrics[-1]["results"][f"{bits} bits"] == pytest.approx(accuracy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": []}, r"algorithm\.bits must be a list of at least one bit-width, got \[\]"),
        ({"bits": [9, 4]}, r"algorithm\.bits must be a list of integers from 1 to 8, got \[9, 4\]"),
        ({"bits": [0]}, r"integers from 1 to 8, got \[0\]"),
        ({"bits": [4, 4]}, "different bit-widths"),
        ({"bits": 8}, "at least one bit-width, got 8"),
        ({"zero_shot": [4]}, r"algorithm\.zero_shot must be of bits that algorithm\.bits does not have"),
        ({"zero_shot": [11]}, r"algorithm\.zero_shot must be a list of integers from 1 to 8"),
        ({"calibration_batches": 0}, r"algorithm\.calibration_batches must be an integer of at least 1"),
        ({"weight": "BWN"}, r"unknown key algorithm\.weight\.bits"),
        ({"weight": "TWN"}, r"unknown key algorithm\.weight\.bits"),
        ({"weight": "HWGQ"}, "HWGQ has steps for"),
        ({"alpha": -1.0}, r"algorithm\.alpha: PACT: alpha must be at least"),
        ({"skip": "last"}, r"algorithm\.skip = 'last' is not known"),
        ({"teacher": "best"}, r"algorithm\.teacher = 'best' is not known"),
        ({"confidence": "loss"}, r"algorithm\.confidence = 'loss' is not known"),
        ({"distance": -1}, r"algorithm\.distance must be 0 or positive"),
        ({"swap": "some"}, r"algorithm\.swap = 'some' is not known"),
        ({"p1": 1.5}, r"algorithm\.p1 must be in \[0, 1\]"),
        ({"quantizer_lr": -1}, r"algorithm\.quantizer_lr must be 0 or a positive number"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ConfigError, match=message):
        build_algorithm("coquant", {"bits": BITS, **options})


def test_swapping_needs_residual_blocks():
    with pytest.raises(UserError, match=r"needs a network with residual blocks .* use algorithm\.swap = 'none'"):
        build_algorithm("coquant", {"bits": BITS}).prepare(build_model("tiny_convnet", 10, in_channels=1))


def test_networks_that_have_blocks():
    for name, count in (("resnet20", 9), ("resnet50", 16), ("preact_resnet18", 8), ("mobilenet_v2", 17)):
        with torch.device("meta"):
            assert len(coquant.residual_blocks(build_model(name, 10, in_channels=3))) == count


def test_statistics_of_weights_are_computed_once_a_step(monkeypatch):
    from quantkernels.quantizers import dorefa

    calls, original = [], torch.tanh
    algorithm, network, joint = prepared()
    monkeypatch.setattr(dorefa.torch, "tanh", lambda x: calls.append(x) or original(x))
    algorithm.before_batch(network, 0)
    algorithm.loss(joint, *batch(), F.cross_entropy)
    assert len(calls) == sum(isinstance(m, QuantizedLayer) for m in network.modules())


@pytest.mark.parametrize(("options", "reads"), [({"swap": "none"}, 0), ({"swap": "uniform", "p1": 0.0}, 2)])
def test_the_step_reads_no_value_of_the_device_but_the_teacher_of_a_swap(monkeypatch, options, reads):
    """Two of the three students have several teachers to choose from."""
    algorithm, network, joint = prepared(**options)
    algorithm.before_batch(network, 0)
    read = []
    for name in ("item", "tolist", "__int__", "__float__", "__bool__", "__index__"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda x, name=name, f=original: read.append(name) or f(x))
    algorithm.loss(joint, *batch(), F.cross_entropy)[0].backward()
    monkeypatch.undo()
    assert read == ["__int__"] * reads


def test_blocks_of_mobilenet_are_lent():
    torch.manual_seed(6)
    algorithm = build_algorithm("coquant", {"bits": [8, 2], "p1": 0.5, "swap": "uniform"})
    network = algorithm.prepare(build_model("mobilenet_v2", 10, in_channels=1, stem="cifar"))
    algorithm.start(network, 100, 10, 10)
    algorithm.before_batch(network, 0)
    inputs, targets = batch()
    algorithm.loss(algorithm.wrap(network), inputs[:4], targets[:4], F.cross_entropy)[0].backward()
    assert 0 < sum(algorithm.lent[1]) < 17
    for block, lent in zip(coquant.residual_blocks(network), algorithm.lent[1], strict=True):
        assert all((m.norms["2"].weight.grad is None) == lent for m in block.modules() if hasattr(m, "norms"))
