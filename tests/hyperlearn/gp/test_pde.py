"""`hyperlearn.gp.pde`: equations as the user writes them, and their linearisation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import hyperlearn as hl
import operators as ops
from hyperlearn.gp.gauss_newton import starting_states

D = torch.float64


def points(n: int = 7, d: int = 2) -> Tensor:
    return torch.rand(n, d, dtype=D, generator=torch.Generator().manual_seed(1))


def burgers(x: Tensor, u: Tensor, grad_u: Tensor, hess_u: Tensor) -> Tensor:
    return grad_u[0] + u * grad_u[1] - 0.02 * hess_u[1, 1]


def test_arguments_say_what_is_wanted() -> None:
    equation = hl.Equation(burgers, points())
    assert {name: (w.field, w.kind) for name, w in equation.wanted.items()} == {
        "u": ("u", "value"),
        "grad_u": ("u", "gradient"),
        "hess_u": ("u", "hessian"),
    }
    assert equation.fields == {"u"}


def test_the_linearisation_is_the_frechet_derivative() -> None:
    """``L v = d/dt R(u + t v)`` for functions u and v, by central differences."""
    x = points()
    equation = hl.Equation(burgers, x)
    pde = hl.PDE([equation])

    def u(z: Tensor) -> Tensor:
        return torch.sin(2 * z[:, 0] + z[:, 1])

    def v(z: Tensor) -> Tensor:
        return torch.exp(z[:, 0] * z[:, 1])

    def moved(t: float) -> list[dict[str, Tensor]]:
        return starting_states(pde, {"u": lambda z: u(z) + t * v(z)})

    (blocks, target) = equation.linearised(moved(0.0)[0])
    h = 1e-6
    slope = (equation.values(moved(h)[0]) - equation.values(moved(-h)[0])) / (2 * h)
    state = starting_states(pde, {"u": v})[0]
    L = blocks[0]["u"]
    image = (
        L.value * state["u"]
        + (L.gradient * state["grad_u"]).sum(1)
        + (L.hessian * state["hess_u"]).sum((1, 2))
    )
    torch.testing.assert_close(image, slope[:, 0], rtol=1e-8, atol=1e-8)
    # b = L u - R(u)
    at_u = moved(0.0)[0]
    Lu = (
        L.value * at_u["u"]
        + (L.gradient * at_u["grad_u"]).sum(1)
        + (L.hessian * at_u["hess_u"]).sum((1, 2))
    )
    torch.testing.assert_close(target, Lu - equation.values(at_u)[:, 0])


def test_only_what_the_residual_depends_on_is_differentiated() -> None:
    blocks, _ = hl.Equation(burgers, points()).linearised(hl.Equation(burgers, points()).zeros())
    assert blocks[0]["u"].entries == ((1, 1),)
    assert blocks[0]["u"].axes == (0, 1)
    transport, _ = hl.Equation(lambda x, grad_u: x[0] * grad_u[1], points()).linearised(
        hl.Equation(lambda x, grad_u: x[0] * grad_u[1], points()).zeros()
    )
    assert transport[0]["u"].axes == (1,)


def test_a_system_of_two_fields() -> None:
    def schroedinger(u: Tensor, v: Tensor, grad_u: Tensor, grad_v: Tensor, hess_v: Tensor,
                     hess_u: Tensor) -> Tensor:  # fmt: skip
        first = grad_u[0] + 0.5 * hess_v[1, 1] + (u**2 + v**2) * v
        second = grad_v[0] - 0.5 * hess_u[1, 1] - (u**2 + v**2) * u
        return torch.stack([first, second])

    equation = hl.Equation(schroedinger, points())
    pde = hl.PDE([equation])
    assert pde.fields == ("u", "v")
    states = starting_states(pde, {"u": lambda z: z[:, 0], "v": lambda z: z[:, 1] ** 2})
    blocks, target = equation.linearised(states[0])
    assert len(blocks) == 2
    assert target.shape == (14,)
    # The first equation has no second derivative of u, the second none of v.
    assert blocks[0]["u"].hessian is None
    assert blocks[0]["v"].hessian is not None
    assert blocks[1]["v"].hessian is None


def test_parameters_and_data_are_handed_over() -> None:
    x = points()

    def heat(grad_u: Tensor, hess_u: Tensor, params: dict[str, Tensor], data: Tensor) -> Tensor:
        return grad_u[0] - params["nu"] * hess_u[1, 1] - data

    pde = hl.PDE([hl.Equation(heat, x, x[:, 0])], params={"nu": torch.tensor(0.5, dtype=D)})
    values = pde.values(pde.zeros())[0]
    torch.testing.assert_close(values[:, 0], -x[:, 0])
    other = pde.linearised(pde.zeros(), {"nu": torch.tensor(2.0, dtype=D)})
    torch.testing.assert_close(
        other.blocks[0]["u"].hessian[:, 1, 1], torch.full((7,), -2.0, dtype=D)
    )


def test_a_residual_that_cannot_be_traced_depends_on_everything() -> None:
    class Opaque(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(u: Tensor) -> Tensor:
            return u**2

        @staticmethod
        def setup_context(ctx: torch.autograd.function.FunctionCtx, inputs, output) -> None:
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, grad: Tensor) -> Tensor:
            return 2 * ctx.saved_tensors[0] * grad

    equation = hl.Equation(lambda u, lap_u: Opaque.apply(u) - lap_u, points())
    state = {"u": torch.full((7,), 3.0, dtype=D), "lap_u": torch.zeros(7, dtype=D)}
    blocks, _ = equation.linearised(state)
    torch.testing.assert_close(blocks[0]["u"].value, torch.full((7,), 6.0, dtype=D))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: hl.Equation(3.0, points()), TypeError, "expected a function of one point"),
        (lambda: hl.Equation(lambda u: u, points()[0]), ValueError, r"expected \(n, d\)"),
        (lambda: hl.Equation(lambda u: u, points().int()), TypeError, "expected a floating tensor"),
        (lambda: hl.Equation(lambda u: u, points() * torch.nan), ValueError, "14 NaN or infinite"),
        (lambda: hl.Equation(lambda x: x.sum(), points()), ValueError, "asks for no field"),
        (lambda: hl.Equation(lambda *u: u[0], points()), TypeError, "expected arguments by name"),
        (lambda: hl.Equation(lambda u, data: u, points()), ValueError, "data is not given"),
        (lambda: hl.Equation(lambda u: u, points(), points()), ValueError, "data is given"),
        (
            lambda: hl.Equation(lambda u, data: u, points(), points(3)),
            ValueError,
            r"expected a tensor \(7, ...\)",
        ),
        (
            lambda: hl.Equation(lambda u, data: u - data, points(), torch.full((7,), torch.nan)),
            ValueError,
            "data holds 7 NaN",
        ),
        (lambda: hl.Equation(lambda u: u, points(), noise=-1.0), ValueError, "noise=-1.0"),
        (lambda: hl.PDE([]), ValueError, "equations is empty"),
        (
            lambda: hl.PDE(
                [hl.Equation(lambda u: u, points()), hl.Equation(lambda u: u, points(3, 1))]
            ),
            ValueError,
            "differ in dtype, device or dimension",
        ),
        (
            lambda: hl.PDE([hl.Equation(lambda u, params: u, points())]),
            ValueError,
            "takes params, and the PDE has none",
        ),
        (
            lambda: hl.PDE([hl.Equation(lambda u: u, points() + 5)], domain=[(0, 1), (0, 1)]),
            ValueError,
            "7 of 7 points are outside of the domain",
        ),
    ],
)
def test_errors_name_what_is_wrong(make, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("residual", "message"),
    [
        (lambda u: torch.ones(2, 2) * u, r"a tensor of shape \(2, 2\)"),
        (lambda u: 3.0, "a float; expected a scalar"),
        (lambda u: u > 0, "torch.bool"),
        (lambda u: torch.ones((), dtype=D), "depends on no field"),
    ],
)
def test_a_residual_of_the_wrong_kind(residual, message: str) -> None:
    equation = hl.Equation(residual, points())
    with pytest.raises(ValueError, match=message):
        equation.linearised(equation.zeros())


def test_a_detached_residual_is_found_out() -> None:
    equation = hl.Equation(lambda u: u.detach() ** 2, points())
    with pytest.raises(ValueError, match="not differentiably"):
        hl.solve_pde(hl.PDE([equation]), ops.RBF(0.5), start=[{"u": torch.ones(7, dtype=D)}])


def test_start_of_other_shapes_is_refused() -> None:
    pde = hl.PDE([hl.Equation(lambda u: u - 1, points())])
    with pytest.raises(ValueError, match=r"start of .* has shapes"):
        hl.solve_pde(pde, ops.RBF(0.5), start=[{"u": torch.zeros(3, dtype=D)}])
