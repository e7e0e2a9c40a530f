"""Reference solutions: their equations, their data, anchors, and methods that are not theirs."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import mpmath  # type: ignore[import-untyped]
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from scipy.integrate import solve_ivp
from scipy.sparse.linalg import spsolve
from torch import Tensor
from torch.func import hessian, jacfwd, vmap

from hyperlearn.experiments.references import (
    burgers,
    chebyshev,
    darcy,
    eikonal,
    elliptic,
    gray_scott,
    monge_ampere,
    points,
    schroedinger,
    sum_of_sines,
)

Field = Callable[[Tensor], Tensor]
SQUARE = points.UNIT_SQUARE


def rows(*values: tuple[float, float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def inside(n: int, box: points.Box = SQUARE, seed: int = 0) -> Tensor:
    return points.uniform_interior(n, box, torch.Generator().manual_seed(seed))


def sides(n: int, seed: int = 0) -> Tensor:
    return points.uniform_boundary(n, SQUARE, torch.Generator().manual_seed(seed))


def gradients(u: Field, x: Tensor) -> Tensor:
    """(n, ..., d): derivatives last."""
    return vmap(jacfwd(u))(x)


def hessians(u: Field, x: Tensor) -> Tensor:
    return vmap(hessian(u))(x)


def laplacian(u: Field, x: Tensor) -> Tensor:
    return hessians(u, x).diagonal(dim1=-2, dim2=-1).sum(-1)


# Points


def test_uniform_points_lie_in_the_box_and_repeat_with_the_seed() -> None:
    box = ((0.0, 1.0), (-5.0, 5.0), (2.0, 3.0))
    x = inside(500, box)
    assert x.shape == (500, 3)
    assert x.dtype == torch.float64
    lower, upper = torch.tensor(box, dtype=torch.float64).T
    assert ((lower < x) & (x < upper)).all()
    assert (x.mean(0) - (lower + upper) / 2).abs().max() < 0.5
    assert torch.equal(x, inside(500, box))
    assert not torch.equal(x, inside(500, box, seed=1))


def test_boundary_points_are_shared_out_over_the_faces() -> None:
    box = ((0.0, 0.1), (-1.0, 2.0), (0.0, 1.0))
    x = points.uniform_boundary(14, box, torch.Generator().manual_seed(0))
    lower, upper = torch.tensor(box, dtype=torch.float64).T
    on = torch.stack([x == lower, x == upper], dim=-1).reshape(14, 6)
    assert (on.sum(1) == 1).all()
    assert on.sum(0).tolist() == [3, 3, 2, 2, 2, 2]
    assert on.int().argmax(1).tolist() == sorted(on.int().argmax(1).tolist())
    face = points.uniform_face(5, box, torch.Generator(), axis=1, upper=True)
    assert (face[:, 1] == 2.0).all()


def test_grids_with_and_without_the_boundary() -> None:
    box = ((0.0, 1.0), (-1.0, 1.0))
    x = points.grid(5, box)
    assert x.shape == (25, 2)
    assert x[1].tolist() == [0.0, -0.5]  # the last coordinate runs fastest
    assert x[-1].tolist() == [1.0, 1.0]
    inner = points.grid(3, box, interior_only=True)
    assert torch.equal(inner, x.reshape(5, 5, 2)[1:-1, 1:-1].reshape(9, 2))


@pytest.mark.parametrize(
    "call",
    [
        lambda g: points.uniform_interior(-1, SQUARE, g),
        lambda g: points.uniform_interior(1, ((1.0, 1.0),), g),
        lambda g: points.uniform_face(1, SQUARE, g, axis=2, upper=True),
        lambda g: points.grid(1, SQUARE),
        lambda g: points.grid(0, SQUARE, interior_only=True),
        lambda g: points.coordinates(torch.zeros(3, 3)),
        lambda g: points.coordinates(torch.tensor(0.0)),
    ],
)
def test_points_refuse_what_makes_no_sense(call: Callable[[torch.Generator], Any]) -> None:
    with pytest.raises(ValueError, match=r"n=|axis=|n_per_side=|empty|shape"):
        call(torch.Generator())


def test_coordinates_refuse_integers() -> None:
    with pytest.raises(TypeError, match="int64"):
        elliptic.solution(torch.zeros(3, 2, dtype=torch.int64))


# What all share

SOLUTIONS: list[Field] = [
    burgers.solution,
    darcy.solution,
    eikonal.solution,
    elliptic.solution,
    gray_scott.solution,
    monge_ampere.solution,
    schroedinger.solution,
    sum_of_sines.solution,
]


@pytest.mark.parametrize("u", SOLUTIONS, ids=lambda u: u.__module__.rpartition(".")[2])
def test_shape_dtype_and_vmap(u: Field) -> None:
    x = inside(6)
    value = u(x)
    assert value.dtype == torch.float64
    assert value.isfinite().all()
    torch.testing.assert_close(u(x.reshape(2, 3, 2)), value.reshape(2, 3, *value.shape[1:]))
    torch.testing.assert_close(vmap(u)(x), value)
    assert u(x[:0]).shape == (0, *value.shape[1:])
    single = u(x.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), value, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("u", SOLUTIONS, ids=lambda u: u.__module__.rpartition(".")[2])
def test_first_derivatives_are_those_of_differences(u: Field) -> None:
    x = 0.2 + 0.6 * inside(3, seed=2)
    step = 1e-5
    exact = gradients(u, x)
    for axis in range(2):
        shift = step * torch.eye(2, dtype=torch.float64)[axis]
        difference = (u(x + shift) - u(x - shift)) / (2 * step)
        torch.testing.assert_close(exact[..., axis], difference, rtol=1e-4, atol=1e-4)


# Elliptic equations


@pytest.mark.parametrize(
    ("u", "f"),
    [
        (elliptic.solution, elliptic.source),
        (
            lambda x: elliptic.solution(x, amplitude=2.0, frequency=3),
            lambda x: elliptic.source(x, amplitude=2.0, frequency=3),
        ),
        (sum_of_sines.solution, sum_of_sines.source),
        (
            lambda x: sum_of_sines.solution(x, terms=20, decay=3.0),
            lambda x: sum_of_sines.source(x, terms=20, decay=3.0),
        ),
    ],
)
def test_cubic_elliptic_equation(u: Field, f: Field) -> None:
    x = inside(20)
    torch.testing.assert_close(-laplacian(u, x) + u(x) ** 3, f(x), rtol=1e-11, atol=1e-10)
    assert u(sides(40)).abs().max() < 1e-13


def test_sum_of_sines_is_its_sum_and_does_not_mind_the_slabs() -> None:
    x = inside(2500)
    value = sum_of_sines.solution(x)
    few = x[[0, 1023, 1024, 2499]].numpy()
    k = np.arange(1, 601)[:, None]
    direct = (np.sin(k * np.pi * few[:, 0]) * np.sin(k * np.pi * few[:, 1]) / k**6.0).sum(0)
    np.testing.assert_allclose(value[[0, 1023, 1024, 2499]], direct, rtol=1e-12)
    with pytest.raises(ValueError, match="terms=0"):
        sum_of_sines.solution(x, terms=0)


@pytest.mark.parametrize("center", [(0.0, 0.0), (0.5, 0.5)])
def test_monge_ampere_equation_and_convexity(center: tuple[float, float]) -> None:
    x = inside(20)
    second = hessians(lambda p: monge_ampere.solution(p, center=center), x)
    torch.testing.assert_close(torch.linalg.det(second), monge_ampere.source(x, center=center))
    assert torch.linalg.eigvalsh(second).min() > 0


# Eikonal


def test_eikonal_anchors() -> None:
    x = rows((0.5, 0.5), (0.25, 0.4))
    wide = rows((0.3677169787, 0.2331048974))[0]
    thin = rows((0.4861370564, 0.2499999970))[0]
    torch.testing.assert_close(eikonal.solution(x, eps=0.1), wide, rtol=0, atol=1e-10)
    torch.testing.assert_close(eikonal.solution(x, eps=0.01), thin, rtol=0, atol=1e-10)


@pytest.mark.parametrize("eps", [0.1, 0.01, 0.002])
def test_eikonal_equation(eps: float) -> None:
    # on the diagonal and the middle lines, where the square is folded, and in a corner
    special = rows((0.3, 0.3), (0.5, 0.5), (0.5, 0.2), (0.6, 0.4), (0.003, 0.002), (0.999, 0.0015))
    x = torch.cat([inside(30), special])

    def u(p: Tensor) -> Tensor:
        return eikonal.solution(p, eps=eps)

    slope = gradients(u, x).square().sum(-1)
    torch.testing.assert_close(slope, 1 + eps * laplacian(u, x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("eps", [1.0, 0.1, 0.01, 0.002])
def test_eikonal_is_smooth_across_the_diagonal(eps: float) -> None:
    # Each term satisfies the equation and the fold makes u symmetric, whatever the coefficients;
    # but only the right sum, tail included, leaves no kink where the roles of x and y change.
    place = torch.cat([10.0 ** -torch.arange(1.0, 7.0), torch.tensor([0.03, 0.2, 0.37])]).double()

    def u(p: Tensor) -> Tensor:
        return eikonal.solution(p, eps=eps)

    along_x, along_y = gradients(u, torch.stack([place, place], dim=1)).T
    torch.testing.assert_close(along_x, along_y, rtol=1e-9, atol=0)


def test_eikonal_vanishes_on_the_boundary_and_is_symmetric() -> None:
    grid = points.grid(100, SQUARE)
    u = eikonal.solution(grid).reshape(100, 100)
    for edge in (u[0], u[-1], u[:, 0], u[:, -1]):
        assert (edge == 0).all()
    inner = u[1:-1, 1:-1]
    assert inner.min() > 0
    distance = torch.minimum(grid, 1 - grid).amin(1).reshape(100, 100)
    assert (u <= distance + 1e-15).all()
    for image in (u.T, u.flip(0), u.flip(1)):
        torch.testing.assert_close(u, image, rtol=0, atol=1e-13)


def test_eikonal_corner_joins_the_boundary_continuously() -> None:
    # |grad u| <= 1, so u cannot exceed the distance, however near the corner
    near = 10.0 ** -torch.arange(2.0, 12.0, dtype=torch.float64)
    u = eikonal.solution(torch.stack([near, near / 3], dim=1))
    assert (u > 0).all()
    assert (u < near / 3).all()
    assert (u[1:] < u[:-1]).all()


@pytest.mark.parametrize("eps", [0.1, 0.05])
def test_eikonal_agrees_with_the_plain_double_series(eps: float) -> None:
    x = 0.1 + 0.8 * inside(50)
    m = torch.arange(1, 400, 2, dtype=torch.float64)
    g = torch.sqrt((m * math.pi) ** 2 + eps**-2)

    def half(a: Tensor, b: Tensor) -> Tensor:
        decay = torch.exp(-g * b[:, None]) + torch.exp(-g * (1 - b[:, None]))
        wave = decay / (1 + torch.exp(-g)) * torch.sin(m * math.pi * a[:, None])
        return (4 / (m * math.pi) * wave).sum(1)

    v = half(x[:, 0], x[:, 1]) + half(x[:, 1], x[:, 0])
    expected = -eps * torch.log(v)
    torch.testing.assert_close(eikonal.solution(x, eps=eps), expected, rtol=0, atol=1e-11)


def test_eikonal_sum_equals_a_long_sum() -> None:
    # f decays like a term in the corner does, and its sum over odd m is known in closed form
    m, weight = eikonal._wave_numbers()
    for rate in (1e-4, 0.01, 0.3):
        exact = -0.5 * math.log(math.tanh(rate / 2))  # sum of exp(-rate m) / m
        assert math.isclose(float(weight @ (np.exp(-rate * m) / m)), exact, rel_tol=1e-13)
    assert math.isclose(float(weight @ m**-2.0), math.pi**2 / 8, rel_tol=1e-8)


def test_eikonal_refuses_no_viscosity() -> None:
    with pytest.raises(ValueError, match="eps=0"):
        eikonal.solution(rows((0.1, 0.1)), eps=0)


# Burgers


@pytest.mark.parametrize(("nu", "rtol"), [(0.5, 1e-11), (0.02, 1e-11), (1e-3, 1e-10)])
def test_burgers_equation(nu: float, rtol: float) -> None:
    shock = rows((0.4, 0.004), (0.7, -0.001), (1.0, 0.002))
    x = torch.cat([inside(30, ((0.05, 1.0), (-1.0, 1.0))), shock])

    def u(p: Tensor) -> Tensor:
        return burgers.solution(p, nu=nu)

    first, second = gradients(u, x), hessians(u, x)
    diffusion = nu * second[:, 1, 1]
    residual = first[:, 0] + u(x) * first[:, 1] - diffusion
    assert residual.abs().max() < rtol * diffusion.abs().max()


@pytest.mark.parametrize("nu", [0.02, 1e-3])
def test_burgers_initial_values_walls_and_symmetry(nu: float) -> None:
    x = inside(50, burgers.BOX)
    start = x * rows((0.0, 1.0))
    torch.testing.assert_close(burgers.solution(start, nu=nu), burgers.initial(x))
    for wall in (-1.0, 0.0, 1.0):
        on = torch.stack([x[:, 0], torch.full((50,), wall, dtype=torch.float64)], dim=1)
        assert burgers.solution(on, nu=nu).abs().max() < 1e-12
    mirrored = burgers.solution(x * rows((1.0, -1.0)), nu=nu)
    torch.testing.assert_close(burgers.solution(x, nu=nu), -mirrored, rtol=0, atol=1e-12)


@cache
def bessel(n: int, nu: float, digits: int) -> Any:
    with mpmath.workdps(digits):
        return mpmath.besseli(n, 1 / (2 * mpmath.pi * mpmath.mpf(nu)))


def bessel_series(t: float, x: float, nu: float, digits: int) -> float:
    """Cole-Hopf as a cosine series: exp(-z cos(pi x)) has the coefficients (-1)^n I_n(z)."""
    with mpmath.workdps(digits):
        pi = mpmath.pi
        place = pi * mpmath.mpf(x)
        value, slope, n = bessel(0, nu, digits), mpmath.mpf(0), 1
        while True:
            size = 2 * bessel(n, nu, digits) * mpmath.exp(-((n * pi) ** 2) * nu * mpmath.mpf(t))
            value += (-1) ** n * size * mpmath.cos(n * place)
            slope -= (-1) ** n * size * n * pi * mpmath.sin(n * place)
            n += 1
            if size < mpmath.mpf(10) ** (5 - digits):
                return float(-2 * nu * slope / value)


@pytest.mark.parametrize(
    ("nu", "digits", "atol"), [(0.1, 40, 1e-13), (0.02, 40, 1e-13), (1e-3, 190, 1e-12)]
)
def test_burgers_agrees_with_its_bessel_series(nu: float, digits: int, atol: float) -> None:
    x = rows((0.2, 0.3), (0.5, 0.01), (0.5, -0.7), (1.0, 0.002), (1.0, 0.95))
    value = burgers.solution(x, nu=nu)
    exact = torch.tensor(
        [bessel_series(t, y, nu, digits) for t, y in x.tolist()], dtype=torch.float64
    )
    torch.testing.assert_close(value, exact, rtol=0, atol=atol)


def test_burgers_agrees_with_gauss_hermite() -> None:
    nu = 0.02
    x = inside(200, burgers.BOX)
    node, weight = (torch.from_numpy(a) for a in np.polynomial.hermite.hermgauss(80))
    s = math.pi * (x[:, 1:] - torch.sqrt(4 * nu * x[:, :1]) * node)
    mass = weight * torch.exp(-torch.cos(s) / (2 * math.pi * nu))
    expected = -(mass * torch.sin(s)).sum(1) / mass.sum(1)
    torch.testing.assert_close(burgers.solution(x, nu=nu), expected, rtol=0, atol=1e-8)


def test_burgers_step_is_fine_enough() -> None:
    x = inside(200, burgers.BOX)
    for nu in (1.0, 0.1, 0.02, 1e-3, 1e-4):
        fine = burgers.solution(x, nu=nu, step=0.05)
        assert (burgers.solution(x, nu=nu) - fine).abs().max() < 1e-15 / nu + 1e-14


@pytest.mark.parametrize("settings", [{"nu": 0.0}, {"step": -1.0}])
def test_burgers_refuses(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="positive"):
        burgers.solution(rows((0.1, 0.1)), **settings)


# Schroedinger


def test_schroedinger_initial_values_period_and_mass() -> None:
    places = torch.arange(-5, 5, 10 / 512, dtype=torch.float64)
    start = torch.stack([torch.zeros_like(places), places], dim=1)
    value = schroedinger.solution(start)
    torch.testing.assert_close(value, schroedinger.initial(start), rtol=0, atol=1e-13)
    later = start + rows((0.73217, 0.0))
    h = schroedinger.solution(later)
    torch.testing.assert_close(h.square().sum(), value.square().sum(), rtol=1e-12, atol=0)
    torch.testing.assert_close(schroedinger.solution(later + rows((0.0, 10.0))), h)
    torch.testing.assert_close(schroedinger.solution(later * rows((1.0, -1.0))), h)


def test_schroedinger_is_near_the_infinite_line() -> None:
    x = points.grid(41, schroedinger.BOX)
    t, y = x.T
    top = torch.cosh(3 * y) + 3 * torch.exp(4j * t) * torch.cosh(y)
    bottom = torch.cosh(4 * y) + 4 * torch.cosh(2 * y) + 3 * torch.cos(4 * t)
    line = torch.view_as_real(4 * torch.exp(0.5j * t) * top / bottom)
    distance = (schroedinger.solution(x) - line).norm(dim=1)
    assert 1e-3 < distance[y.abs() < 3].max() < 5e-3
    assert 1e-2 < distance.max() < 2.5e-2


def test_schroedinger_agrees_with_a_runge_kutta_method() -> None:
    modes, times = 128, [0.0, 0.3003, 0.61237, 1.0]
    places = -5 + 10 * np.arange(modes) / modes
    k = 2 * np.pi / 10 * np.fft.fftfreq(modes, 1 / modes)

    def rate(t: float, h: Any) -> Any:
        return -0.5j * np.fft.ifft(k**2 * np.fft.fft(h)) + 1j * abs(h) ** 2 * h

    start = (2 / np.cosh(places)).astype(complex)
    run = solve_ivp(
        rate, (0, 1), start, method="DOP853", t_eval=times, rtol=1e-9, atol=1e-9, max_step=5e-3
    )
    x = torch.cartesian_prod(torch.tensor(times).double(), torch.from_numpy(places))
    exact = torch.view_as_real(torch.from_numpy(run.y.T.copy())).reshape(-1, 2)
    error = [
        (schroedinger.solution(x, modes=modes, step=step) - exact).abs().max().item()
        for step in (4e-4, 2e-4)
    ]
    assert error[1] < 1.5e-5
    assert 3.8 < error[0] / error[1] < 4.2  # second order


def test_schroedinger_time_between_kept_fields() -> None:
    x = inside(50, schroedinger.BOX)
    other = schroedinger.solution(x, modes=256, step=1.9e-4)  # fields at other times
    value = schroedinger.solution(x, modes=256, step=2e-4)
    torch.testing.assert_close(value, other, rtol=0, atol=3e-6)


@pytest.mark.parametrize("settings", [{"modes": 7}, {"modes": 0}, {"step": 0.0}])
def test_schroedinger_refuses(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected a"):
        schroedinger.solution(rows((0.1, 0.1)), **settings)


# Gray-Scott


def test_gray_scott_anchors_and_initial_values() -> None:
    value = gray_scott.solution(rows((1.0, 0.5)))
    torch.testing.assert_close(value, rows((0.03871, -0.84471)), rtol=0, atol=1.1e-5)
    x = inside(50) * rows((0.0, 1.0))
    start = gray_scott.initial(x[:, 1])
    torch.testing.assert_close(gray_scott.solution(x), start, rtol=0, atol=1e-12)


def test_gray_scott_equation_and_walls() -> None:
    x = inside(40)
    u, v = gray_scott.solution(x).T
    first, second = gradients(gray_scott.solution, x), hessians(gray_scott.solution, x)
    diffusion = second[:, :, 1, 1] * rows((1e-3, 2e-3))
    gain = torch.stack([-u * v**2 + 0.04 * (1 - u), u * v**2 - 0.10 * v], dim=1)
    assert (first[..., 0] - diffusion - gain).abs().max() < 1e-7
    walls = torch.stack([x[:, 0], x[:, 1].round()], dim=1)
    assert gradients(gray_scott.solution, walls)[..., 1].abs().max() < 1e-11


def bump_in_the_middle(x: Tensor) -> Tensor:
    bump = torch.exp(-80 * (x - 0.5) ** 2)  # flat at both ends, to 2e-7
    return torch.stack([1 - bump, 0.5 * bump], dim=-1)


def rest(x: Tensor) -> Tensor:
    return torch.stack([torch.ones_like(x), torch.zeros_like(x)], dim=-1)


def test_gray_scott_from_other_initial_values() -> None:
    x = inside(50)
    still = gray_scott.solution(x, initial=rest)
    torch.testing.assert_close(still, rest(x[:, 1]), rtol=0, atol=1e-13)
    # finite differences with mirrored ghosts, extrapolated from two mesh widths
    found = []
    for cells in (100, 200):
        place = torch.linspace(0, 1, cells + 1, dtype=torch.float64)
        scale = np.array([[1e-3], [2e-3]]) * cells**2

        def rate(t: float, flat: Any, scale: Any = scale) -> Any:
            w = flat.reshape(2, -1)
            padded = np.concatenate([w[:, 1:2], w, w[:, -2:-1]], axis=1)
            u, v = w
            gain = np.stack([-u * v**2 + 0.04 * (1 - u), u * v**2 - 0.10 * v])
            return (scale * np.diff(padded, 2, axis=1) + gain).ravel()

        start = bump_in_the_middle(place).T.numpy().ravel()
        run = solve_ivp(rate, (0, 1), start, method="DOP853", rtol=1e-10, atol=1e-12)
        found.append(run.y[:, -1].reshape(2, -1)[:, :: cells // 100])
    expected = torch.from_numpy((4 * found[1] - found[0]) / 3).T
    end = points.grid(101, SQUARE)[-101:]
    value = gray_scott.solution(end, initial=bump_in_the_middle)
    torch.testing.assert_close(value, expected, rtol=0, atol=2e-6)


def test_gray_scott_settings_are_fine_enough() -> None:
    x = inside(200)
    finer = gray_scott.solution(x, modes=96, degree=48, rtol=1e-13)
    assert (gray_scott.solution(x) - finer).abs().max() < 2e-11


def test_gray_scott_refuses() -> None:
    with pytest.raises(ValueError, match="expected \\(64, 2\\)"):
        gray_scott.solution(rows((0.1, 0.1)), initial=lambda x: x)
    with pytest.raises(ValueError, match="modes=0"):
        gray_scott.solution(rows((0.1, 0.1)), modes=0)


# Darcy


def test_darcy_equation_and_boundary() -> None:
    x = torch.cat([0.1 + 0.8 * inside(30), rows((0.5, 0.02), (0.98, 0.5))])
    flow = gradients(darcy.solution, x)
    drift = (gradients(darcy.log_permeability, x) * flow).sum(-1)
    residual = laplacian(darcy.solution, x) + drift + torch.exp(-darcy.log_permeability(x))
    assert residual.abs().max() < 1e-5
    torch.testing.assert_close(darcy.log_permeability(x).exp(), darcy.permeability(x))
    assert darcy.solution(sides(80)).abs().max() < 1e-15
    assert (darcy.source(x) == 1).all()


def finite_volumes(cells: int) -> Tensor:
    """-div(a grad u) = 1 by five-point differences with a at the midpoints of edges."""
    size, h = cells - 1, 1 / cells
    node = torch.arange(1, cells, dtype=torch.float64) * h
    edge = (torch.arange(cells, dtype=torch.float64) + 0.5) * h
    difference = sp.eye_array(cells, size) - sp.eye_array(cells, size, k=-1)
    identity = sp.eye_array(size)
    total = sp.csr_array((size * size, size * size))
    for axis, ends in enumerate([(edge, node), (node, edge)]):
        parts = (difference, identity) if axis == 0 else (identity, difference)
        gradient = sp.kron(*parts) / h
        a = darcy.permeability(torch.cartesian_prod(*ends)).numpy()
        total = total + gradient.T @ sp.diags_array(a) @ gradient
    return torch.from_numpy(spsolve(total.tocsc(), np.ones(size * size))).reshape(size, size)


def test_darcy_agrees_with_finite_volumes() -> None:
    coarse, fine = finite_volumes(48), finite_volumes(96)[1::2, 1::2]
    expected = (4 * fine - coarse) / 3
    value = darcy.solution(points.grid(47, SQUARE, interior_only=True)).reshape(47, 47)
    torch.testing.assert_close(value, expected, rtol=0, atol=3e-6)


def test_darcy_degree_is_high_enough() -> None:
    x = inside(500)
    error = (darcy.solution(x, degree=32) - darcy.solution(x)).abs()
    assert error.max() < 2e-7
    assert error.square().mean().sqrt() < 1e-8
    assert abs(darcy.solution(points.grid(100, SQUARE)).max().item() - 0.0244) < 5e-5
    with pytest.raises(ValueError, match="degree=1"):
        darcy.solution(x, degree=1)


# Chebyshev


def test_chebyshev_interpolates_and_differentiates_polynomials() -> None:
    x = chebyshev.nodes(7, -1.0, 3.0)
    assert x[0] == -1.0
    assert x[-1] == 3.0
    power = np.polynomial.Polynomial([1.0, -2.0, 0.5, 0.0, 0.3, -0.1])
    np.testing.assert_allclose(
        chebyshev.differentiation_matrix(x) @ power(x), power.deriv()(x), atol=1e-11
    )
    places = torch.linspace(-1, 3, 30, dtype=torch.float64)
    table = torch.from_numpy(chebyshev.coefficients(power(x)))
    value = chebyshev.polynomials(places, 7, -1.0, 3.0) @ table
    np.testing.assert_allclose(value, power(places.numpy()), atol=1e-12)
    with pytest.raises(ValueError, match="degree=0"):
        chebyshev.nodes(0, 0.0, 1.0)


@pytest.mark.parametrize(
    ("u", "table"),
    [
        (darcy.solution, darcy._coefficients),
        (gray_scott.solution, gray_scott._coefficients),
        (schroedinger.solution, schroedinger._fields),
    ],
    ids=["darcy", "gray_scott", "schroedinger"],
)
def test_what_was_computed_is_kept(u: Field, table: Any) -> None:
    x = rows((0.5, 0.5))
    u(x)
    misses = table.cache_info().misses
    u(x)
    assert table.cache_info().misses == misses
