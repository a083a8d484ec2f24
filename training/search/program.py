"""The integer program: one option for each layer, the lowest sum of costs within all budgets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix

from training.config import UserError

# HiGHS stops at an absolute gap, and tolerates an absolute violation, of 1e-6: sums are scaled to sizes beside which
# that is nothing.
COST_SCALE = 1e4
BUDGET_SCALE = 1e6


@dataclass(frozen=True)
class Budget:
    """What the options of each layer take of a resource (one array a layer), and how much of it there is."""

    name: str
    limit: float
    use: Sequence[np.ndarray]


def solve(costs: Sequence[np.ndarray], budgets: Sequence[Budget]) -> list[int]:
    """The index of each layer's option: min sum cost, with sum use <= limit for every budget (HiGHS, exact).

    costs: one array a layer, one number an option; infinite for options that are excluded.
    Raises UserError where a budget cannot be met, naming the smallest that can.
    """
    allowed = [np.isfinite(cost) for cost in costs]
    for budget in budgets:
        check_feasible(budget, allowed)
    cost = np.where(np.concatenate(allowed), np.concatenate(costs), 0.0)
    scale = COST_SCALE / (np.abs(cost).sum() or 1.0)
    layers = np.repeat(np.arange(len(costs)), [len(c) for c in costs])
    one_each = csr_matrix((np.ones(len(layers)), (layers, np.arange(len(layers)))))
    constraints = [LinearConstraint(one_each, 1, 1)]
    for budget in budgets:
        row = np.concatenate(budget.use) * (BUDGET_SCALE / budget.limit)
        constraints.append(LinearConstraint(csr_matrix(row[None]), -np.inf, BUDGET_SCALE))
    found = milp(
        cost * scale,
        constraints=constraints,
        integrality=np.ones(len(cost)),
        bounds=Bounds(0, np.concatenate(allowed).astype(float)),
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        names = " and ".join(f"{budget.name} = {budget.limit:g}" for budget in budgets)
        raise UserError(f"the budgets {names} cannot be met together; raise one of them ({found.message})")
    parts = np.split(found.x, np.cumsum([len(c) for c in costs])[:-1])
    return [int(part.argmax()) for part in parts]


def check_feasible(budget: Budget, allowed: Sequence[np.ndarray]) -> None:
    """Raises UserError with the smallest feasible budget where this one is below it."""
    least = sum(use[mask].min() for use, mask in zip(budget.use, allowed, strict=True))
    if least > budget.limit * (1 + 1e-12):  # a sum of fractions may end a rounding above
        raise UserError(
            f"{budget.name} = {budget.limit:.6g} is below the smallest feasible budget, {least:.6g}, "
            "that of the lowest allowed bits in every layer: raise it to that, or allow fewer bits"
        )
