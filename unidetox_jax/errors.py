"""What goes wrong by a user's hand, and how it is said: one line, an exit code, no traceback."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake that the user can mend: the message names the file, the field, what was found and expected."""

    exit_code = 2


class Preempted(Exception):
    """The run was asked to stop and has saved its state; starting it again continues."""

    exit_code = 75  # EX_TEMPFAIL: schedulers requeue it, and must not take it for success


def suggest(name: str, known: Iterable[str]) -> str:
    """The tail of a message about an unknown name: the nearest known one, then all of them."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{hint} (known: {', '.join(known)})"
