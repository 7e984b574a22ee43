"""Errors that are written for the person at the keyboard: what is wrong, where, and what to do."""

from collections.abc import Sequence

TIME_IS_UP = 75
"""Exit code of a run that was stopped because its time was up: "try again later" in sysexits.h."""


class UserError(Exception):
    """Something the user can mend. Shown as its message alone, without a traceback."""

    exit_code = 2
    """Exit code of the process that ends with this error."""


class InputError(UserError, ValueError):
    """A question, a text or an argument that a model cannot be asked with."""


class TrainingError(UserError):
    """Training itself cannot go on, though everything that was asked for was valid."""

    exit_code = 1


class NotPushedError(UserError):
    """Training is done, and what it ends with is here, but not on the Hub."""

    exit_code = 3


def listing(items: Sequence[object], limit: int = 5) -> str:
    """`items` for a message: the first `limit`, then how many more there are."""
    shown = ", ".join(str(item) for item in items[:limit])
    more = len(items) - limit
    return f"{shown} and {more:,} more" if more > 0 else shown
