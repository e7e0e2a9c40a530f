"""`Equation` and `PDE`: what holds at which points, as the user writes it; its linearisation."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from operators import Functionals
from operators.coloured.dependence import reach_of
from operators.tracing import wrapped

# What a residual may ask for of a field u, by the name of the argument: u, grad_u, lap_u, hess_u.
_KINDS = {"grad": "gradient", "lap": "laplacian", "hess": "hessian"}
_GIVEN = ("x", "params", "data")

# Values and derivatives of the fields at the points of one equation, by the name of the argument.
State = dict[str, Tensor]


@dataclass(frozen=True)
class Wanted:
    """One argument of a residual: a field and which derivative of it."""

    field: str
    kind: str  # value, gradient, laplacian or hessian

    def shape(self, d: int) -> tuple[int, ...]:
        """At one point of dimension d."""
        return {"value": (), "gradient": (d,), "laplacian": (), "hessian": (d, d)}[self.kind]


@dataclass(frozen=True, eq=False)
class Equation:
    """``residual = 0`` at points: a PDE, a boundary or initial condition, an observation.

    Parameters
    ----------
    residual
        Function of one point; its arguments are asked for by name: ``x (d,)``; for a field ``u``:
        its value ``u``, ``grad_u (d,)``, ``lap_u``, ``hess_u (d, d)``; likewise for any other
        field; ``params``, those of the `PDE`; ``data``, this point's row of `data`. It returns a
        scalar, or ``(m,)`` for a system.
    points
        ``(n, d)``.
    data
        Further numbers at the points, a tensor ``(n, ...)``: right-hand sides, boundary values,
        observations.
    noise
        Standard deviation of the residual, for observations; 0 for what holds exactly.
    name
        What to call it.

    Raises
    ------
    TypeError, ValueError
        An argument that is not understood, points that are no finite floating tensor ``(n, d)``, or
        data that do not fit or are not finite.

    Examples
    --------
    >>> import torch, hyperlearn as hl
    >>> x = torch.rand(9, 2, dtype=torch.float64)
    >>> poisson = hl.Equation(lambda x, u, lap_u: -lap_u + u**3 - x.sum(), x)
    >>> sorted(poisson.wanted)
    ['lap_u', 'u']
    """

    residual: Callable[..., Tensor]
    points: Tensor
    data: Tensor | None = None
    noise: float = 0.0
    name: str = ""
    # Those of the PDE, for looking at the structure.
    _example_params: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        residual: object = self.residual
        if not callable(residual):
            kind = type(residual).__name__
            raise TypeError(f"residual is a {kind}; expected a function of one point")
        x = self.points
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{self}: points is {got}; expected a floating tensor (n, d)")
        if x.ndim != 2 or not x.numel():
            raise ValueError(
                f"{self}: points has shape {tuple(x.shape)}; expected (n, d), one point at least"
            )
        _check_finite(x, f"{self}: points")
        if self.data is not None:
            if not isinstance(self.data, Tensor) or self.data.shape[:1] != x.shape[:1]:
                shown = tuple(self.data.shape) if isinstance(self.data, Tensor) else self.data
                raise ValueError(f"{self}: data is {shown}; expected a tensor ({len(x)}, ...)")
            _check_finite(self.data, f"{self}: data")
        if not 0 <= self.noise < float("inf"):
            raise ValueError(
                f"{self}: noise={self.noise}; expected a standard deviation, 0 or more"
            )
        if not self.wanted:
            raise ValueError(
                f"{self} asks for no field; expected arguments such as u, grad_u, lap_u, hess_u"
            )
        if ("data" in self._arguments) != (self.data is not None):
            raise ValueError(
                f"{self}: the residual {'takes' if self.data is None else 'does not take'} an "
                f"argument data, and data is {'not given' if self.data is None else 'given'}"
            )

    @cached_property
    def _arguments(self) -> tuple[str, ...]:
        try:
            parameters = inspect.signature(self.residual).parameters.values()
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"{self}: the arguments of the residual cannot be read: {error}"
            ) from None
        kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        for parameter in parameters:
            if parameter.kind not in kinds:
                raise TypeError(
                    f"{self}: the residual takes {parameter}; expected arguments by name, as x, u, "
                    "grad_u, lap_u, hess_u, params, data"
                )
        return tuple(p.name for p in parameters if p.default is p.empty)

    @cached_property
    def wanted(self) -> dict[str, Wanted]:
        """What the residual asks for of the fields, by argument."""
        found = {}
        for name in self._arguments:
            if name in _GIVEN:
                continue
            prefix, _, rest = name.partition("_")
            if prefix in _KINDS and rest:
                found[name] = Wanted(rest, _KINDS[prefix])
            else:
                found[name] = Wanted(name, "value")
        return found

    @property
    def fields(self) -> set[str]:
        """Names of the fields that it is about."""
        return {wanted.field for wanted in self.wanted.values()}

    def at(self, points: Tensor, data: Tensor | None = None) -> Equation:
        """The same at other points."""
        return replace(self, points=points, data=data)

    def rows(self, index: Tensor) -> Equation:
        """The same at some of the points."""
        return self.at(self.points[index], None if self.data is None else self.data[index])

    def zeros(self) -> State:
        """The state of fields that vanish."""
        x = self.points
        return {
            name: x.new_zeros(len(x), *wanted.shape(x.shape[1]))
            for name, wanted in self.wanted.items()
        }

    def functionals(self) -> dict[str, dict[str, list[Functionals]]]:
        """Functionals that give the state, by field: ``field -> argument -> parts``."""
        x, d = self.points, self.points.shape[1]
        found: dict[str, dict[str, list[Functionals]]] = {}
        for name, wanted in self.wanted.items():
            if wanted.kind == "value":
                parts = [Functionals.value_at(x)]
            elif wanted.kind == "laplacian":
                parts = [Functionals.laplacian_at(x)]
            elif wanted.kind == "gradient":
                parts = [Functionals.gradient_at(x, a) for a in range(d)]
            else:
                parts = [Functionals.second_at(x, a, b) for a in range(d) for b in range(a, d)]
            found.setdefault(wanted.field, {})[name] = parts
        return found

    # --- at a state ---------------------------------------------------------------------------

    def _one(self, state: State, x: Tensor, data: Tensor | None, params: Any) -> Tensor:
        given = {"x": x, "data": data, "params": params}
        arguments = {name: given[name] for name in self._arguments if name in _GIVEN}
        try:
            value = self.residual(**state, **arguments)
        except (IndexError, TypeError, AttributeError) as error:
            shapes = ", ".join(f"{name} {tuple(v.shape)}" for name, v in state.items())
            raise type(error)(
                f"{self}: the residual fails at one point, {shapes}: {error}"
            ) from error
        if not isinstance(value, Tensor) or value.ndim > 1 or not value.is_floating_point():
            got = (
                f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
                if isinstance(value, Tensor)
                else f"a {type(value).__name__}"
            )
            raise ValueError(
                f"{self}: the residual at one point is {got}; expected a scalar, or (m,) for a "
                "system, of torch operations"
            )
        return value.reshape(-1)

    def values(self, state: State, params: Any = None) -> Tensor:
        """Residuals ``(n, m)``."""
        dims = (0, 0, None if self.data is None else 0, None)
        values: Tensor = torch.func.vmap(self._one, in_dims=dims)(
            state, self.points, self.data, params
        )
        return values

    @cached_property
    def _structure(self) -> list[dict[str, list[tuple[int, ...]]]]:
        """For each component: which entries of each argument it depends on, for any values."""
        d = self.points.shape[1]
        x = self.points[0]
        shapes = {name: wanted.shape(d) for name, wanted in self.wanted.items()}
        entries = [(name, index) for name, shape in shapes.items() for index in _indices(shape)]

        def flat(u: Tensor) -> Tensor:
            parts = u.split([len(_indices(shape)) for shape in shapes.values()])
            state = {
                name: part.reshape(shape)
                for (name, shape), part in zip(shapes.items(), parts, strict=True)
            }
            data = None if self.data is None else self.data[0]
            return self._one(state, x, data, self._example_params)

        start = torch.linspace(0.3, 0.7, len(entries), dtype=x.dtype, device=x.device)
        try:
            found = reach_of(flat, start)[0].tocsr()
        except ValueError:
            # It cannot be traced: each component may depend on everything.
            count = len(flat(start))
            return [_all(entries) for _ in range(count)]
        structure = []
        for row in range(found.shape[0]):
            reached: dict[str, list[tuple[int, ...]]] = {}
            for column in found.indices[found.indptr[row] : found.indptr[row + 1]]:
                name, index = entries[column]
                reached.setdefault(name, []).append(index)
            structure.append(reached)
        return structure

    def linearised(
        self, state: State, params: Any = None
    ) -> tuple[list[dict[str, Functionals]], Tensor]:
        """``L u = b``, the residual's Taylor expansion to first order at a state.

        ``L = dR/du`` (the Frechet derivative: coefficients of u and its derivatives), ``b = L u_k -
        R(u_k)``.

        Returns
        -------
        tuple
            For each component a block of functionals by field; and ``b``, ``(m n,)``, block by
            block.
        """

        def both(
            state: State, x: Tensor, data: Tensor | None, params: Any
        ) -> tuple[Tensor, Tensor]:
            value = self._one(state, x, data, params)
            return value, value

        dims = (0, 0, None if self.data is None else 0, None)
        slopes, values = torch.func.vmap(torch.func.jacrev(both, has_aux=True), in_dims=dims)(
            state, self.points, self.data, params
        )
        self._check_values(state, slopes, values)
        blocks, targets = [], []
        for c in range(values.shape[1]):
            coefficients: dict[str, dict[str, Any]] = {}
            target = -values[:, c]
            for name, reached in self._structure[c].items():
                wanted, slope = self.wanted[name], slopes[name][:, c]
                target = target + (slope * state[name]).reshape(len(slope), -1).sum(-1)
                parts = coefficients.setdefault(wanted.field, {})
                parts[wanted.kind] = slope
                if wanted.kind == "hessian":
                    pairs = {(min(a, b), max(a, b)) for a, b in reached}
                    parts["entries"] = tuple(sorted(pairs))
                if wanted.kind == "gradient":
                    parts["axes"] = tuple(sorted({a for (a,) in reached}))
            if not coefficients:
                raise ValueError(
                    f"{self}: component {c} of the residual depends on no field; expected an "
                    "equation for one"
                )
            blocks.append(
                {name: Functionals(self.points, **parts) for name, parts in coefficients.items()}
            )
            targets.append(target)
        return blocks, torch.cat(targets)

    def _check_values(self, state: State, slopes: dict[str, Tensor], values: Tensor) -> None:
        n = len(values)
        tensors = [values, *slopes.values()]
        if any(wrapped(tensor) for tensor in tensors):
            return
        finite = torch.stack([t.detach().reshape(n, -1).isfinite().all(1) for t in tensors]).all(0)
        if not bool(finite.all()):
            k = int((~finite).nonzero()[0])
            at = {name: value[k].tolist() for name, value in state.items()}
            raise FloatingPointError(
                f"{self}: the residual or its derivative is not finite at {n - int(finite.sum())} "
                f"of "
                f"{n} points; the first is {self.points[k].tolist()}, with {at}"
            )

    def __str__(self) -> str:
        return self.name or getattr(self.residual, "__name__", "equation")


def _all(entries: list[tuple[str, tuple[int, ...]]]) -> dict[str, list[tuple[int, ...]]]:
    found: dict[str, list[tuple[int, ...]]] = {}
    for name, index in entries:
        found.setdefault(name, []).append(index)
    return found


def _indices(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = [()]
    for n in shape:
        found = [(*index, i) for index in found for i in range(n)]
    return found


def _check_finite(tensor: Tensor, name: str) -> None:
    if not bool(torch.isfinite(tensor).all()):
        count = int((~torch.isfinite(tensor)).sum())
        raise ValueError(f"{name} holds {count} NaN or infinite entries; expected finite numbers")


@dataclass(frozen=True, eq=False)
class PDE:
    """Equations for one field or several, and the parameters that they share.

    Parameters
    ----------
    equations
        Those of the interior, of the boundary, initial conditions, observations.
    params
        Tensors, or nested structures of them, that residuals take as ``params``: a viscosity, say.
    domain
        ``((low, high), ...)`` of each coordinate; equations at points outside of it are refused.

    Raises
    ------
    ValueError
        There is no equation, or they are of other dtypes, devices or dimensions.

    Examples
    --------
    >>> import torch, hyperlearn as hl
    >>> x = torch.rand(40, 2, dtype=torch.float64)
    >>> edge = torch.tensor([[0.0, 0.5], [1.0, 0.5]], dtype=torch.float64)
    >>> pde = hl.PDE(
    ...     [
    ...         hl.Equation(lambda u, lap_u: -lap_u + u**3 - 1.0, x),
    ...         hl.Equation(lambda u: u, edge),
    ...     ]
    ... )
    >>> pde.fields
    ('u',)
    """

    equations: Sequence[Equation]
    params: Any = None
    domain: Sequence[tuple[float, float]] | None = None

    def __post_init__(self) -> None:
        if not self.equations:
            raise ValueError("equations is empty; expected one Equation at least")
        for equation in self.equations:
            if not isinstance(equation, Equation):
                raise TypeError(f"{equation!r:.100} is no Equation")
        kinds = {(e.points.dtype, e.points.device, e.points.shape[1]) for e in self.equations}
        if len(kinds) != 1:
            raise ValueError(
                "the equations' points differ in dtype, device or dimension: "
                + ", ".join(sorted(str(kind) for kind in kinds))
            )
        if self.domain is not None:
            self._check_inside(self.domain)
        for equation in self.equations:
            if "params" in equation._arguments and self.params is None:
                raise ValueError(
                    f"{equation} takes params, and the PDE has none: PDE(..., params=)"
                )
            object.__setattr__(equation, "_example_params", self.params)

    def _check_inside(self, domain: Sequence[tuple[float, float]]) -> None:
        d = self.equations[0].points.shape[1]
        if len(domain) != d:
            raise ValueError(f"domain has {len(domain)} intervals for points of dimension {d}")
        for equation in self.equations:
            x = equation.points
            bounds = torch.tensor(domain, dtype=x.dtype, device=x.device)
            outside = ((x < bounds[:, 0]) | (x > bounds[:, 1])).any(1)
            if bool(outside.any()):
                first = x[outside][0].tolist()
                raise ValueError(
                    f"{equation}: {int(outside.sum())} of {len(x)} points are outside of the "
                    f"domain "
                    f"{tuple(domain)}, {first} the first"
                )

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the unknown functions, sorted."""
        return tuple(sorted(set().union(*(equation.fields for equation in self.equations))))

    @property
    def dtype(self) -> torch.dtype:
        """Of points."""
        return self.equations[0].points.dtype

    @property
    def size(self) -> int:
        """Number of points, of all equations."""
        return sum(len(equation.points) for equation in self.equations)

    def zeros(self) -> list[State]:
        """Where the Gauss-Newton iteration starts unless told otherwise: u = 0."""
        return [equation.zeros() for equation in self.equations]

    def values(self, states: Sequence[State], params: Any = None) -> list[Tensor]:
        """Residuals of each equation, ``(n, m)``."""
        params = self.params if params is None else params
        return [e.values(s, params) for e, s in zip(self.equations, states, strict=True)]

    def linearised(self, states: Sequence[State], params: Any = None) -> Linearised:
        """All equations' Taylor expansion to first order."""
        params = self.params if params is None else params
        blocks: list[Mapping[str, Functionals]] = []
        targets, variances = [], []
        for equation, state in zip(self.equations, states, strict=True):
            rows, target = equation.linearised(state, params)
            blocks += rows
            targets.append(target)
            variances.append(torch.full_like(target, equation.noise**2))
        sizes = tuple(len(target) for target in targets)
        return Linearised(blocks, torch.cat(targets), torch.cat(variances), sizes)


@dataclass(frozen=True)
class Linearised:
    """``L u = b`` with independent errors of given variances."""

    blocks: list[Mapping[str, Functionals]]
    target: Tensor
    noise: Tensor
    # Rows of each equation.
    sizes: tuple[int, ...]

    def split(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Something of all rows, equation by equation."""
        return rows.split(list(self.sizes))
