"""The progress of probes: passes over the rows that were made and that are expected, the loss, and the time left."""

import threading
from collections.abc import Callable
from typing import Protocol

from residua.analysis.support.cluster import Cluster

_EXPECTED = {"classification": 40, "regression": 2}  # passes over the rows of a site


class Loss(Protocol):
    """Shows the loss of the latest pass."""

    def loss(self, loss: float) -> None:
        """Show the loss of the latest pass, in nats."""
        ...


class PassBar:
    """A bar over the passes of several sites, which several threads move.

    How many passes a classification needs shows only when it converges, so the bar begins with an estimate; when a site
    is done, its own number takes the place of the estimate.

    Args:
        cluster: Draws the bar if it draws bars.
        label: Text of the bar.
        n_sites: Number of sites.
        task: What the probes do.
    """

    def __init__(self, cluster: Cluster, label: str, n_sites: int, task: str) -> None:
        self._expected = _EXPECTED[task]
        self._bar = cluster.bar(label, n_sites * self._expected, "pass")
        self._lock = threading.Lock()
        self._n_sites, self._done = n_sites, 0
        self._losses = ""

    def site(self) -> "SiteBar":
        """Return what the passes over one site move."""
        return SiteBar(self)

    def close(self) -> None:
        """Remove the bar."""
        self._bar.close()

    def loss(self, loss: float) -> None:
        """Show the loss of the latest pass, in nats."""
        with self._lock:
            self._bar.set_postfix_str(f"loss {loss:.4f}, {self._done} of {self._n_sites} sites done", refresh=False)

    def moved(self, share: float) -> None:
        """Move the bar by a share of a pass."""
        with self._lock:
            self._bar.update(share)
            if self._bar.total is not None and self._bar.n > self._bar.total:
                self._bar.total = self._bar.n + 1

    def site_done(self, n_passes: float) -> None:
        """Replace the estimate of a site by the number of passes that it took."""
        with self._lock:
            self._done += 1
            if self._bar.total is not None:
                self._bar.total = max(self._bar.n, self._bar.total + n_passes - self._expected)
            self._bar.refresh()


class SiteBar:
    """Counts the passes over one site."""

    def __init__(self, bar: PassBar) -> None:
        self._bar = bar
        self._n_passes = 0.0

    def moved(self, share: float) -> None:
        """Move the bar by a share of a pass over this site."""
        self._n_passes += share
        self._bar.moved(share)

    def done(self) -> None:
        """Say that the site is done."""
        self._bar.site_done(self._n_passes)


class SiteReport:
    """Sends the progress of a site that a worker fits, once a pass, to where the bar is.

    Args:
        send: Takes the passes that were made since the last call, and the loss of the latest.
    """

    def __init__(self, send: Callable[[tuple[float, float]], object]) -> None:
        self._send = send
        self._n_passes = 0.0

    def moved(self, share: float) -> None:
        """Add a share of a pass to what is sent next."""
        self._n_passes += share

    def loss(self, loss: float) -> None:
        """Send the progress."""
        self._send((self._n_passes, loss))
        self._n_passes = 0.0
