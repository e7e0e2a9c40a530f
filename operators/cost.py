"""What one product with an operator costs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """Cost of one product ``A v``, as far as it is known before it runs.

    Parameters
    ----------
    flops
        Floating-point operations of the arithmetic that an operator does itself.
    evaluations
        Work inside the user's functions, in units of one evaluation of such a function: a forward-
        or reverse-mode sweep counts two, the usual bound (Griewank and Walther, 2008, ch. 3).
    solves
        Linear solves.

    Examples
    --------
    >>> str(Cost(flops=2_000_000) + Cost(evaluations=4))
    '2 Mflop + 4 evaluations'
    """

    flops: float = 0
    evaluations: float = 0
    solves: float = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flops + other.flops,
            self.evaluations + other.evaluations,
            self.solves + other.solves,
        )

    def __mul__(self, times: float) -> Cost:
        return Cost(self.flops * times, self.evaluations * times, self.solves * times)

    __rmul__ = __mul__

    def __str__(self) -> str:
        parts = [_flops(self.flops)] if self.flops or self == Cost() else []
        for count, what in ((self.evaluations, "evaluation"), (self.solves, "solve")):
            if count:
                parts.append(f"{count:g} {what}{'s' * (count != 1)}")
        return " + ".join(parts)


def _flops(count: float) -> str:
    for scale, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= scale:
            return f"{count / scale:.3g} {prefix}flop"
    return f"{count:g} flop"
