"""Errors that a user's input can cause; the command line turns them into one line and exit code 2."""

from collections.abc import Iterable, Sequence


class InputError(ValueError):
    """Bad input: the message says what was given, what is allowed and, where it helps, what to do next."""


class ManifoldError(InputError):
    """A matrix is not on the manifold it was declared to be on, or has lost its manifold."""


def check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """Raise InputError unless ``value`` is one of the allowed strings."""
    if value not in allowed:
        raise InputError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def check_int(name: str, value: object) -> None:
    """Raise TypeError unless ``value`` is a whole number; True and False are none."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")


def check_count(name: str, value: int) -> None:
    """Raise TypeError unless ``value`` is a whole number, InputError unless it is at least 1."""
    check_int(name, value)
    if value < 1:
        raise InputError(f"{name} must be at least 1, got {value}")


def listed(names: Iterable[str], limit: int = 6) -> str:
    """Return the first names and how many more there are."""
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
