"""Every algorithm with small options, for what must hold of each: processes, resuming, waiting, memory."""

import pytest
import residual  # noqa: F401 (makes "tiny_residual" known)

BITS = [{"kind": "MinMax", "bits": bits} for bits in (2, 4, 8)]
CLIPPED = [{"kind": "PACT", "bits": bits, "alpha": 2.0} for bits in (2, 4, 8)]
SEARCHED = [f"{block}.conv{i}" for block in (3, 4, 5) for i in (1, 2)]  # of tiny_residual, but for its shortcut

ALGORITHMS = {
    "float": {"name": "float"},
    "min-max": {"name": "vanilla", "weight": BITS[0], "activation": CLIPPED[1]},
    "HWGQ": {"name": "vanilla", "weight": {"kind": "BWN", "axis": 0}, "activation": {"kind": "HWGQ", "bits": 2}},
    "DoReFa": {"name": "vanilla", "weight": {"kind": "DoReFa", "bits": 2}, "activation": CLIPPED[0]},
    "LQ-Nets": {"name": "lqnets", "weight_bits": 2, "activation_bits": 2},
    "DQA": {"name": "dqa", "weight": BITS, "activation": CLIPPED, "penalty": 5.0},
    "Binary-Relax": {"name": "binary_relax", "weight": BITS, "activation": CLIPPED[:1]},
    "LIMPQ": {"name": "limpq", "bits": [4, 3, 2]},
    "mixed precision": {
        "name": "mixed_precision",
        "policy": {"layers": {name: [3, 4] for name in SEARCHED} | {"4.downsample.0": [2, 3]}},
        "calibration_batches": 2,
    },
    "DiffQ": {"name": "diffq", "penalty": 10.0, "bits_lr": 0.05, "groups": "channel", "max_bits": 4},
    "switchable BN": {"name": "switchable_bn", "bits": [4, 2], "zero_shot": [3], "calibration_batches": 2},
    "AdaBits": {"name": "adabits", "bits": [4, 2], "weight": "CentredDoReFa"},
    "CoQuant": {
        "name": "coquant",
        "bits": [8, 4, 2],
        "zero_shot": [3],
        "calibration_batches": 2,
        "distance": 1e-6,  # so that the confidence decides, which is not the same in parts of a batch
        "swap": "uniform",
        "p1": 0.5,
    },
}

QUICK = ("float", "LQ-Nets", "LIMPQ", "CoQuant")  # the others are for `make test-training`
EACH = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in ALGORITHMS]


def chosen(request):
    """The algorithms of those tests of a module that are selected and use the fixture of `request`."""
    tests = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    using = [test for test in tests if request.fixturename in test.fixturenames]
    return [test.callspec.params["name"] for test in using if "name" in test.callspec.params]


def small(tiny, name, batch_norm=True):
    """The config of a run of 8 steps in 2 epochs, with a checkpoint after the fifth."""
    return tiny(
        model={"name": "tiny_residual", "batch_norm": batch_norm},
        data={"batch_size": 60, "subset": 240},
        run={"epochs": 2, "checkpoint_steps": 5},
        algorithm=ALGORITHMS[name],
    )
