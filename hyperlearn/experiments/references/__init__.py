"""Exact and reference solutions of the PDE experiments, as functions of points.

One module an equation, each with `solution`, its data (`source`, `initial`, ...) and its `BOX`.
Points are rows ``(..., 2)``; where time is a coordinate it is the first, ``(t, x)``. No solution is
read from a file: a closed form is evaluated, any other one is computed on its first use and kept
for the life of the process. Accuracies are stated for float64.

============================  =========================================  =====================
module                        equation                                   solution by
============================  =========================================  =====================
`elliptic`                    ``-Lap u + u^3 = f``                       closed form
`sum_of_sines`                ``-Lap u + u^3 = f``                       closed form
`monge_ampere`                ``det D^2 u = f``                          closed form
`eikonal`                     ``|grad u|^2 = 1 + eps Lap u``             series and integral
`burgers`                     ``u_t + u u_x = nu u_xx``                  Cole-Hopf quadrature
`schroedinger`                ``i h_t + h_xx / 2 + |h|^2 h = 0``         split-step Fourier
`gray_scott`                  reaction and diffusion of two species      cosine collocation
`darcy`                       ``-div(a grad u) = 1``                     Chebyshev collocation
============================  =========================================  =====================

`points` draws collocation points.
"""

from hyperlearn.experiments.references import (
    burgers,
    darcy,
    eikonal,
    elliptic,
    gray_scott,
    monge_ampere,
    points,
    schroedinger,
    sum_of_sines,
)

__all__ = [
    "burgers",
    "darcy",
    "eikonal",
    "elliptic",
    "gray_scott",
    "monge_ampere",
    "points",
    "schroedinger",
    "sum_of_sines",
]
