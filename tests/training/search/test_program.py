"""The integer program against brute force; budgets that cannot be met."""

import itertools
import time

import numpy as np
import pytest

from training.config import UserError
from training.search.program import Budget, solve


def brute_force(costs, budgets):
    """(lowest cost, all choices that have it)."""
    found = []
    for choice in itertools.product(*(range(len(cost)) for cost in costs)):
        cost = sum(layer[i] for layer, i in zip(costs, choice, strict=True))
        if np.isfinite(cost) and all(
            sum(use[i] for use, i in zip(budget.use, choice, strict=True)) <= budget.limit * (1 + 1e-12)
            for budget in budgets
        ):
            found.append((cost, list(choice)))
    best = min(cost for cost, _ in found)
    return best, [choice for cost, choice in found if cost <= best * (1 + 1e-9)]


def problem(random, scale):
    """Four layers with five to seven options, some of them excluded, and one to three budgets."""
    options = random.integers(5, 8, 4)
    costs = [scale * random.random(n) for n in options]
    for cost in costs:
        cost[random.random(len(cost)) < 0.2] = np.inf
        cost[0] = scale * random.random()
    budgets = []
    for i in range(random.integers(1, 4)):
        use = [random.integers(1, 10**9, n).astype(float) for n in options]
        allowed = [np.isfinite(cost) for cost in costs]
        least = sum(u[0] for u in use)  # the first options together are feasible
        most = sum(u[mask].max() for u, mask in zip(use, allowed, strict=True))
        budgets.append(Budget(f"budget {i}", least + random.random() * 0.7 * max(most - least, 0.0), use))
    return costs, budgets


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e6])
def test_the_program_is_brute_force(scale):
    random = np.random.default_rng(0)
    for _ in range(25):
        costs, budgets = problem(random, scale)
        best, choices = brute_force(costs, budgets)
        found = solve(costs, budgets)
        assert found in choices
        assert sum(cost[i] for cost, i in zip(costs, found, strict=True)) == pytest.approx(best)


def test_a_budget_that_is_met_exactly():
    use = [np.array([4.0, 9.0, 16.0]) * macs for macs in (1e9 / 3, 2e9, 5e8)]
    costs = [np.array([3.0, 2.0, 1.0])] * 3
    limit = sum(u[1] for u in use)
    assert (
        solve(costs, [Budget("bitops", limit, use)]) == [1, 1, 1]
        or brute_force(costs, [Budget("bitops", limit, use)])[0] < 6
    )
    assert solve(costs, [Budget("bitops", sum(u[0] for u in use), use)]) == [0, 0, 0]


def test_a_budget_below_the_minimum_names_it():
    use = [np.array([2.0, 4.0]), np.array([3.0, 5.0])]
    with pytest.raises(UserError, match=r"size_mb = 4\.5 is below the smallest feasible budget, 5,"):
        solve([np.array([1.0, 0.5])] * 2, [Budget("size_mb", 4.5, use)])
    with pytest.raises(UserError, match="smallest feasible budget, 7,"):  # the lowest bits of one layer are excluded
        solve([np.array([np.inf, 0.5]), np.array([1.0, 0.5])], [Budget("size_mb", 6.5, use)])


def test_budgets_that_cannot_be_met_together():
    one, other = np.array([1.0, 3.0]), np.array([3.0, 1.0])
    budgets = [Budget("bitops", 1.5, [one]), Budget("size_mb", 2.0, [other])]
    with pytest.raises(UserError, match=r"the budgets bitops = 1\.5 and size_mb = 2 cannot be met together"):
        solve([np.array([1.0, 1.0])], budgets)


def test_a_network_of_fifty_layers_takes_no_time():
    """The size of ResNet-50's program, 1,300 binaries."""
    random = np.random.default_rng(1)
    pairs = np.array([(w, a) for w in (6, 5, 4, 3, 2) for a in (6, 5, 4, 3, 2)], dtype=float)
    steps = np.sort(random.random((52, 2, 5)) * 0.1, axis=2)  # rising as the bits fall
    macs = random.integers(10**7, 2 * 10**8, 52)
    costs = [np.array([s[1][int(6 - a)] + 2 * s[0][int(6 - w)] for w, a in pairs]) for s in steps]
    use = [m * pairs[:, 0] * pairs[:, 1] for m in macs]
    began = time.process_time()
    found = solve(costs, [Budget("bitops", macs.sum() * 12.0, use)])
    assert time.process_time() - began < 20
    assert sum(u[i] for u, i in zip(use, found, strict=True)) <= macs.sum() * 12
