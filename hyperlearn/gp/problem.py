"""`KernelProblem`: learning the kernel of a PDE, as a bilevel problem."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hyperlearn.gp.backend import Backend
from hyperlearn.gp.gauss_newton import by_field, starting_states, step
from hyperlearn.gp.objectives import Held, Objective
from hyperlearn.gp.pde import PDE
from hyperlearn.gp.posterior import Posterior
from hyperlearn.problem import BilevelProblem
from operators import Kernel

Tree = Any
Regularizer = Callable[[Tree], Tensor]


@dataclass(frozen=True, eq=False)
class KernelProblem(BilevelProblem):
    """``min_theta J(u_theta) + R(theta)``, u_theta the solution of a PDE with the kernel of theta.

    The inner variable y is the state: what the residuals ask of u at the points of the equations
    and at those of the objective. The inner solution is a fixed point of the Gauss-Newton step, ``y
    = T(y, x)``. The outer variable x holds the kernels' parameters by field, and under ``"params"``
    those of the PDE that are learnt. Made by `kernel_problem`.
    """

    pde: PDE = field(kw_only=True)
    kernels: Mapping[str, Kernel] = field(kw_only=True)
    objective: Objective = field(kw_only=True)
    penalty: Regularizer | None = field(kw_only=True, default=None)
    nugget: float = field(kw_only=True, default=1e-10)
    backend: Backend | None = field(kw_only=True, default=None)
    solution_fields: Callable[[Posterior], Mapping[str, Any]] | None = field(
        kw_only=True, default=None
    )

    def kernels_at(self, x: Tree) -> dict[str, Kernel]:
        """The kernels with the parameters x."""
        return {name: kernel.with_parameters(x[name]) for name, kernel in self.kernels.items()}

    def params_at(self, x: Tree) -> Any:
        """The PDE's parameters, with those that are learnt at x."""
        learnt = x.get("params")
        return self.pde.params if learnt is None else {**self.pde.params, **learnt}

    def posterior(self, y: Tree, x: Tree) -> Posterior:
        """Given the equations linearised at the state y."""
        params = self.params_at(x)
        return step(self.pde, self.kernels_at(x), y["states"], self.nugget, self.backend, params)

    def held(self, y: Tree) -> Held:
        """What the objective holds out."""
        return Held(self.objective.validation, y["validation"])

    def loss(self, posterior: Posterior, held: Held, x: Tree, generator: torch.Generator) -> Tensor:
        """``J + R``."""
        value = self.objective.loss(posterior, held, self.params_at(x), generator)
        return value if self.penalty is None else value + self.penalty(x)

    def mapped(self, y: Tree, x: Tree) -> Tree:
        """``T(y, x)``: the state of the minimum-norm solution of the equations linearised at y."""
        return self.state_of(self.posterior(y, x))

    def state_of(self, posterior: Posterior) -> Tree:
        """Y of a function."""
        validation = [posterior.state(equation) for equation in self.objective.validation]
        return {"states": posterior.states(self.pde), "validation": validation}

    def conclude(self, y: Tree, x: Tree) -> Mapping[str, Any]:
        """What a run stores of the solution beside x and y."""
        if self.solution_fields is None:
            return {}
        with torch.no_grad():
            return self.solution_fields(self.posterior(y, x))


def kernel_problem(
    pde: PDE,
    kernel: Kernel | Mapping[str, Kernel],
    objective: Objective,
    *,
    nugget: float = 1e-10,
    learn_params: tuple[str, ...] = (),
    regularizer: Regularizer | None = None,
    start: Any = None,
    backend: Backend | None = None,
    metrics: Mapping[str, Callable[[Posterior], float]] | None = None,
    units: Mapping[str, str] | None = None,
    fields: Callable[[Posterior], Mapping[str, Any]] | None = None,
    name: str = "kernel of a PDE",
) -> KernelProblem:
    """The bilevel problem of learning a kernel for a PDE.

    Parameters
    ----------
    pde, kernel, nugget, backend
        As for `solve_pde`.
    objective
        `ValidationResidual`, `LeaveOneOut`, `MarginalLikelihood` or `KernelFlow`.
    learn_params
        Names of the PDE's parameters (floating tensors in a dictionary) that are learnt too.
    regularizer
        ``R(x)`` of the outer variable, a scalar.
    start
        As for `solve_pde`: where the state starts.
    metrics, units
        ``name -> f(posterior)``, recorded as a run goes, and their units.
    fields
        What to store of the last posterior in the run's result.
    name
        In records.

    Examples
    --------
    >>> import torch, hyperlearn as hl, operators as ops
    >>> x = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)[:, None]
    >>> ends = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    >>> interior = hl.Equation(lambda x, u, lap_u: -lap_u + u**3 - torch.sin(9 * x[0]), x)
    >>> pde = hl.PDE([interior, hl.Equation(lambda u: u, ends)])
    >>> objective = hl.ValidationResidual([interior.at(x[:-1] + 0.025)])
    >>> problem = hl.kernel_problem(pde, ops.RBF(1.0), objective)
    >>> method = hl.KernelLearning(step_size=0.05, learning_steps=10)
    >>> run = hl.minimize(problem, method, budget=hl.Budget(steps=60))
    >>> 0.05 < float(run.x["u"]["log_lengthscale"].exp()) < 0.7
    True
    """
    kernels = by_field(kernel, pde)
    x0: dict[str, Any] = {
        name: {key: value.detach().clone() for key, value in one.parameters.items()}
        for name, one in kernels.items()
    }
    if learn_params:
        x0["params"] = _learnt(pde, learn_params)
    states = starting_states(pde, start)
    if objective.validation:
        held_pde = PDE(objective.validation, pde.params)
        validation = starting_states(held_pde, None if isinstance(start, (list, tuple)) else start)
    else:
        validation = []

    def inner_loss(y: Tree, x: Tree) -> Tensor:
        moved = zip(pytree.tree_leaves(problem.mapped(y, x)), pytree.tree_leaves(y), strict=True)
        return sum((0.5 * (new - old).square().sum() for new, old in moved), torch.zeros(()))

    def outer_loss(y: Tree, x: Tree) -> Tensor:
        # Of what is random (kernel flow) the same part each time.
        generator = torch.Generator().manual_seed(0)
        return problem.loss(problem.posterior(y, x), problem.held(y), x, generator)

    latest: dict[str, Any] = {}

    def posterior_at(y: Tree, x: Tree) -> Posterior:
        # The metrics of one record look at one posterior.
        leaves = pytree.tree_leaves((y, x))
        values = [(leaf.data_ptr(), leaf._version) for leaf in leaves]
        if latest.get("values") != values:
            latest.update(values=values, leaves=leaves, posterior=problem.posterior(y, x))
        found: Posterior = latest["posterior"]
        return found

    def of_posterior(metric: Callable[[Posterior], float]) -> Callable[[Tree, Tree], float]:
        return lambda y, x: float(metric(posterior_at(y, x)))

    problem = KernelProblem(
        inner_loss,
        outer_loss,
        x0=x0,
        y0={"states": states, "validation": validation},
        pde=pde,
        kernels=kernels,
        objective=objective,
        penalty=regularizer,
        nugget=nugget,
        backend=backend,
        solution_fields=fields,
        metrics={key: of_posterior(metric) for key, metric in (metrics or {}).items()},
        units=dict(units or {}),
        name=name,
    )
    return problem


def _learnt(pde: PDE, names: tuple[str, ...]) -> dict[str, Tensor]:
    held = pde.params
    if not isinstance(held, Mapping) or any(name not in held for name in names):
        known = list(held) if isinstance(held, Mapping) else held
        raise ValueError(f"learn_params={names}, but the PDE's params are {known}")
    for name in names:
        if not isinstance(held[name], Tensor) or not held[name].is_floating_point():
            raise TypeError(f"params[{name!r}] is {held[name]!r}; expected a floating tensor")
    return {name: held[name].detach().clone() for name in names}
