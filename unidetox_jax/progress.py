"""What a terminal shows: progress of long work (a bar; in a log a line now and then), and tables."""

import sys
from collections.abc import Sequence

import tqdm

LOG_INTERVAL = 10.0  # seconds between lines where the output is not a terminal


class Progress(tqdm.tqdm):
    """A tqdm bar over `total` units that started at `initial` (work found done already).

    `update(n)` counts; `set_postfix(loss=…)` adds figures. Not a terminal: one line every ten seconds.
    Only process 0 of a multi-host run should show one (`disable=True` elsewhere).
    """

    def __init__(self, total: int, unit: str, label: str, initial: int = 0, disable: bool = False):
        terminal = sys.stderr.isatty()
        super().__init__(
            total=total,
            initial=initial,
            unit=f" {unit}",
            desc=label,
            disable=disable,
            dynamic_ncols=terminal,
            mininterval=0.2 if terminal else LOG_INTERVAL,
            maxinterval=LOG_INTERVAL,
            file=sys.stderr if terminal else _Lines(),
            ascii=not terminal,
        )


class _Lines:
    """A stream for logs: tqdm's carriage returns become ends of line."""

    def write(self, text: str) -> None:
        text = text.strip("\r\n")
        if text:
            sys.stderr.write(text + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def aligned(lines: Sequence[Sequence[str]], left: int = 0) -> str:
    """Lines of cells under one another: the first `left` columns at the left, the others at the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            text.ljust(width) if column < left else text.rjust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
