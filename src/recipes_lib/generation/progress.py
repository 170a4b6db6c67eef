"""Progress of answers and judgments: one line that is rewritten on a terminal, a line every half
minute elsewhere. On stderr.
"""

from __future__ import annotations

import sys
import time

_EVERY_S = 30.0


class Progress:
    """Counts items and tokens.

    Args:
        what: what is counted ("answers my-run").
        total: how many there will be.
        unit: what `tokens` are called; an empty string leaves the rate of items.
    """

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total = what, total
        self.done = self.tokens = 0
        self.started = self.shown = time.monotonic()
        self.live = sys.stderr.isatty()

    def add(self, items: int = 1, tokens: int = 0) -> None:
        """Count, and show where it is time to."""
        self.done += items
        self.tokens += tokens
        now = time.monotonic()
        if self.live and (now - self.shown > 0.2 or self.done == self.total):
            print(f"\r\x1b[K{self.line(now)}", end="", file=sys.stderr, flush=True)
            self.shown = now
        elif not self.live and now - self.shown > _EVERY_S:
            print(self.line(now), file=sys.stderr, flush=True)
            self.shown = now

    def line(self, now: float) -> str:
        """Return the present state as text."""
        spent = max(now - self.started, 1e-9)
        rate = (
            f"{self.tokens / spent:.0f} tokens/s" if self.tokens else f"{self.done / spent:.1f}/s"
        )
        left = (self.total - self.done) * spent / max(self.done, 1)
        return f"{self.what} {self.done}/{self.total}, {rate}, {left:.0f} s left"

    def close(self) -> float:
        """End the line and return the seconds spent."""
        if self.live and self.done:
            print(file=sys.stderr)
        return time.monotonic() - self.started
