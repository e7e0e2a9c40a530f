"""The running average of diagonal Fisher matrices, as batches come."""

from __future__ import annotations

import torch

from operators.curvature.diagonal_fisher import DiagonalFisher
from operators.curvature.model_curvature import checked_damping
from operators.space import Space, Tree


class DiagonalFisherStream:
    """Running average of diagonals ``f_t``, as batches come.

    With ``rho = None`` (exact mean) the operator after T pushes is ``(1/T) sum_t f_t + damping``,
    and with smoothing ``0 < rho < 1``

        (1 / (1 - (1-rho)^T)) sum_t rho (1-rho)^(T-t) f_t + damping ,

    where the factor in front makes the weights sum to one, so that early averages are not too
    small (Kingma and Ba, 2015, arXiv:1412.6980, section 3). The damping stands outside the average.

    Parameters
    ----------
    space
        Space of the parameters.
    damping
        ``>= 0``, constant.
    rho
        Smoothing factor in (0, 1), or None for the exact mean.

    Raises
    ------
    ValueError
        A setting out of range.

    Notes
    -----
    A push costs O(d), and so does the state, however many there were.

    Examples
    --------
    >>> import torch
    >>> stream = DiagonalFisherStream(Space.flat(2, torch.float32), damping=0.5)
    >>> stream.push(torch.tensor([1.0, 0.0]))
    >>> stream.push(torch.tensor([3.0, 0.0]))
    >>> stream.operator().values
    tensor([2.5000, 0.5000])
    """

    def __init__(self, space: Space, *, damping: float = 0.0, rho: float | None = None) -> None:
        checked_damping(damping, space)
        if rho is not None and not 0 < rho < 1:
            raise ValueError(f"rho={rho}; expected 0 < rho < 1, or None for the exact mean")
        self.space, self.damping, self.rho = space, damping, rho
        self.reset()

    def reset(self) -> None:
        """Forget every diagonal."""
        self._mean = torch.zeros(self.space.size, dtype=self.space.dtype, device=self.space.device)
        self._pushed = 0

    def __len__(self) -> int:
        return self._pushed

    def push(self, diagonal: Tree) -> None:
        """Add the diagonal of a batch, without damping.

        Parameters
        ----------
        diagonal
            Of the space, or flat ``(d,)``: ``DiagonalFisher.exact(...).values``, say, with the
            default ``damping=0``.

        Raises
        ------
        ValueError
            Wrong shape or structure.
        TypeError
            Wrong dtype or device.
        """
        f = self.space.coordinates(diagonal, "diagonal").detach()
        self._pushed += 1
        if self.rho is None:
            share = 1 / self._pushed
        else:
            # The mean with weights that sum to one moves by rho over their sum so far.
            share = self.rho / (1 - (1 - self.rho) ** self._pushed)
        self._mean = self._mean + share * (f - self._mean)

    def operator(self) -> DiagonalFisher:
        """The operator as of now.

        Raises
        ------
        RuntimeError
            Nothing was pushed yet.
        """
        if self._pushed == 0:
            raise RuntimeError("no diagonal was pushed: nothing to average")
        return DiagonalFisher(self._mean, self.damping, space=self.space)
