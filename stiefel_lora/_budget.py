"""How many of the layers a budget allows, and whether it is enough for one of what it is spent on."""

import math

from stiefel_lora.errors import InputError


def count_of(budget: float | int, available: int, what: str | None = None) -> int:
    """Return how many of the available layers a budget allows, rounded half up and at least one.

    ``what`` says in errors what it counts.

    Raises:
        InputError: If a float is outside (0, 1] or an int outside [1, available].
        TypeError: If it is neither.
    """
    if isinstance(budget, bool) or not isinstance(budget, int | float):
        raise TypeError(f"budget must be a float (a share) or an int (a count), got {type(budget).__name__}")
    if isinstance(budget, int):
        if not 1 <= budget <= available:
            number = f"the number of {what}" if what else "the number there is"
            raise InputError(f"budget as a count must be in [1, {available}], {number}; got {budget}")
        return budget
    if not 0 < budget <= 1:
        raise InputError(f"budget as a share{f' of {what}' if what else ''} must be in (0, 1], got {budget}")
    return max(1, int(budget * available + 0.5))


def share_of(budget: float, total: int) -> int:
    """Return how many parameters a share of them is; 0.29 of 25600 is 7424, which a product of floats misses."""
    return int(budget * total + 1e-6)


def check_least(budget: float, parameters: int, total: int, least: int, what: str) -> None:
    """Raise InputError if a share of parameters is too small for the smallest of what it is spent on.

    Args:
        budget: The share.
        parameters: The number of parameters that it comes to.
        total: The number of which it is a share.
        least: How many the smallest takes.
        what: Says in errors what it is spent on.
    """
    if parameters < least:
        steps = math.ceil(1e4 * least / total)
        # The next one where rounding takes a parameter off.
        share = next(n / 1e4 for n in (steps, steps + 1) if share_of(n / 1e4, total) >= least)
        raise InputError(
            f"budget as a share of the adapters' parameters must be at least {share}, for one {what}; got {budget}"
        )
