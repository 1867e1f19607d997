"""Taps that are switched off and on together."""

from collections.abc import Iterator
from contextlib import contextmanager


class TapGroup:
    """A switch that several taps can share; ``enabled`` may be set at any time between forward calls.

    On a model that is spread over several processes every process has to set it alike.

    Example:
        >>> ablations = TapGroup()
        >>> with ablations.off():
        ...     ablations.enabled
        False
    """

    def __init__(self) -> None:
        self.enabled = True

    @contextmanager
    def off(self) -> Iterator[None]:
        """Leave the group's taps out of what happens inside; afterwards the switch is as it was."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before
