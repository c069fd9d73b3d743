"""Errors that reach the user: one line and an exit code, no traceback."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake the user can fix: the message names the file, the field, what was found and what was expected."""

    exit_code = 2


class Diverged(UserError):
    """A training whose loss or gradient is not finite."""


class Preempted(Exception):
    """The run was asked to stop and has saved its state; running the same command again resumes it."""

    exit_code = 75  # EX_TEMPFAIL: schedulers requeue it instead of counting it as success


def suggest(name: str, known: Iterable[str]) -> str:
    """Suffix of an unknown-name message: the closest known name, then all of them."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{hint} (known: {', '.join(known)})"
