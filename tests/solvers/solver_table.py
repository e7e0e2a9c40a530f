"""Every solver, by a tolerance, and the systems of `systems.py` that suit it.

Left out are those whose method is an approximation, not a tolerance: `RandomNeumann` and
`SketchAndSolve` have tests of their own.
"""

from __future__ import annotations

from collections.abc import Callable

import solvers
from solvers import LinearSolver
from tests.solvers.systems import SYSTEMS

Factory = Callable[[float], LinearSolver]

SOLVERS: dict[str, tuple[Factory, list[str]]] = {
    "Auto": (lambda rtol: solvers.Auto(rtol=rtol), list(SYSTEMS)),
    # --- dense ---
    "DenseCholesky": (
        lambda rtol: solvers.DenseCholesky(rtol=rtol),
        ["dense spd", "hessian", "shifted hessian", "low rank plus diagonal", "diagonal"],
    ),
    "DenseLDL": (
        lambda rtol: solvers.DenseLDL(rtol=rtol),
        ["dense spd", "dense symmetric", "saddle", "hessian", "diagonal"],
    ),
    "DenseLU": (
        lambda rtol: solvers.DenseLU(rtol=rtol),
        ["dense spd", "dense", "saddle", "jacobian", "hessian", "sparse", "diagonal"],
    ),
    "QR": (lambda rtol: solvers.QR(rtol=rtol), ["tall", "wide", "dense"]),
    "SVD": (lambda rtol: solvers.SVD(rtol=rtol), ["tall", "wide", "dense spd", "dense"]),
    # --- structured ---
    "Diagonal": (lambda rtol: solvers.Diagonal(rtol=rtol), ["diagonal"]),
    "Triangular": (lambda rtol: solvers.Triangular(rtol=rtol), ["dense triangular", "diagonal"]),
    "Woodbury": (lambda rtol: solvers.Woodbury(rtol=rtol), ["low rank plus diagonal", "diagonal"]),
    "ShermanMorrison": (
        lambda rtol: solvers.ShermanMorrison(rtol=rtol),
        ["low rank plus diagonal", "diagonal"],
    ),
    "Kronecker": (lambda rtol: solvers.Kronecker(rtol=rtol), ["kronecker", "kronecker sum"]),
    "BlockDiagonal": (lambda rtol: solvers.BlockDiagonal(rtol=rtol), ["block diagonal"]),
    "BlockTriangular": (lambda rtol: solvers.BlockTriangular(rtol=rtol), ["block triangular"]),
    "Saddle": (lambda rtol: solvers.Saddle(rtol=rtol), ["saddle"]),
    "Circulant": (lambda rtol: solvers.Circulant(rtol=rtol), ["circulant"]),
    "Toeplitz": (lambda rtol: solvers.Toeplitz(rtol=rtol), ["toeplitz"]),
    # --- sparse ---
    "SparseCholesky": (lambda rtol: solvers.SparseCholesky(rtol=rtol), ["sparse spd", "diagonal"]),
    "SparseLU": (lambda rtol: solvers.SparseLU(rtol=rtol), ["sparse", "sparse spd", "diagonal"]),
    # --- Krylov ---
    "CG": (
        lambda rtol: solvers.CG(rtol=rtol),
        ["dense spd", "hessian", "shifted hessian", "sparse spd", "kronecker", "diagonal"],
    ),
    "CG, flexible": (lambda rtol: solvers.CG(rtol=rtol, flexible=True), ["dense spd"]),
    "CG, Jacobi": (
        lambda rtol: solvers.CG(rtol=rtol, preconditioner=solvers.Jacobi()),
        ["dense spd", "sparse spd"],
    ),
    "CG, AMG": (lambda rtol: solvers.CG(rtol=rtol, preconditioner=solvers.AMG()), ["sparse spd"]),
    "MINRES": (
        lambda rtol: solvers.MINRES(rtol=rtol),
        ["dense spd", "dense symmetric", "saddle", "diagonal"],
    ),
    "GMRES": (lambda rtol: solvers.GMRES(rtol=rtol), ["dense", "dense spd", "jacobian", "sparse"]),
    "GMRES, IncompleteLU": (
        lambda rtol: solvers.GMRES(rtol=rtol, preconditioner=solvers.IncompleteLU()),
        ["sparse"],
    ),
    "BiCGStab": (lambda rtol: solvers.BiCGStab(rtol=rtol), ["dense", "dense spd", "sparse"]),
    "LSMR": (lambda rtol: solvers.LSMR(rtol=rtol), ["tall", "wide", "dense", "dense spd"]),
    # --- stationary ---
    "Neumann": (lambda rtol: solvers.Neumann(rtol=rtol, maxiter=10_000), ["dense spd", "dense"]),
    "Richardson": (lambda rtol: solvers.Richardson(rtol=rtol, maxiter=10_000), ["dense spd"]),
    "SOR": (lambda rtol: solvers.SOR(rtol=rtol, maxiter=2000), ["dense spd", "sparse spd"]),
    "SymmetricSOR": (lambda rtol: solvers.SymmetricSOR(rtol=rtol, maxiter=2000), ["dense spd"]),
    "Broyden": (lambda rtol: solvers.Broyden(rtol=rtol), ["dense spd", "dense"]),
    "QuadraticSGD": (lambda rtol: solvers.QuadraticSGD(rtol=rtol, maxiter=10_000), ["dense spd"]),
    # --- sketched ---
    "SketchAndPrecondition": (lambda rtol: solvers.SketchAndPrecondition(rtol=rtol), ["tall"]),
    "SketchAndProject": (
        lambda rtol: solvers.SketchAndProject(rtol=rtol, maxiter=100_000),
        ["dense spd"],
    ),
}
