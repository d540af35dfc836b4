"""Errors that a user's input can cause; the command line turns them into one line and exit code 2."""


class InputError(ValueError):
    """Bad input: the message says what was given, what is allowed and, where it helps, what to do next."""


class ManifoldError(InputError):
    """A matrix is not on the manifold it was declared to be on, or has lost its manifold."""
