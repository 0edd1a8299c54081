"""Counters of a pool: totals for the report, and Ray metrics for Prometheus."""

from __future__ import annotations

from typing import Any

from ray.util.metrics import Counter, Gauge, Histogram

from mlem_dist.engine.progress import PoolProgress, Work

SECONDS = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100]

COUNTERS = {
    "calls": "finished calls of actors",
    "samples": "samples in finished calls",
    "busy_seconds": "device seconds of finished calls; CPU seconds on CPU cores",
    "moved_bytes": "bytes of states and increments that crossed between processes",
    "retries": "calls made again, as their actor died",
    "deaths": "actors lost",
}
GAUGES = {"queue": "calls and blocks that wait for an actor", "actors": "actors able to work"}
HISTOGRAMS = {"wait_seconds": "from a call until an actor takes it", "call_seconds": "from then until it has answered"}


class PoolMetrics:
    """Totals of one pool. Each is also the Ray metric mlem_pool_NAME with the tag `pool`; see docs/clusters.md."""

    def __init__(self, pool: str) -> None:
        self.pool = pool
        self.totals = dict.fromkeys(COUNTERS, 0.0)
        self.waited = 0.0
        tags: Any = {"tag_keys": ("pool",)}
        self._metrics: dict[str, Any] = {
            name: Counter(f"mlem_pool_{name}", text, **tags) for name, text in COUNTERS.items()
        }
        self._metrics |= {name: Gauge(f"mlem_pool_{name}", text, **tags) for name, text in GAUGES.items()}
        self._metrics |= {
            name: Histogram(f"mlem_pool_{name}", text, boundaries=SECONDS, **tags) for name, text in HISTOGRAMS.items()
        }
        for metric in self._metrics.values():
            metric.set_default_tags({"pool": pool})

    def count(self, name: str, value: float = 1) -> None:
        """Add to a total."""
        self.totals[name] += value
        if value:
            self._metrics[name].inc(value)

    def count_call(self, work: Work, seconds: float) -> None:
        """Count a call that has answered `seconds` after an actor took it."""
        self.count("calls")
        self.count("samples", work.samples)
        self.count("busy_seconds", work.busy)
        self.count("moved_bytes", work.moved)
        self._metrics["call_seconds"].observe(seconds)

    def taken(self, seconds: float) -> None:
        """Add the wait, in seconds, of a call or block that an actor takes now."""
        self.waited += seconds
        self._metrics["wait_seconds"].observe(seconds)

    def state(self, queue: int, actors: int) -> None:
        """Set the number of calls and blocks that wait, and the number of actors that can work."""
        self._metrics["queue"].set(queue)
        self._metrics["actors"].set(actors)

    def progress(self, actors: int) -> PoolProgress:
        """The totals, with the number of actors that can work."""
        totals = self.totals
        return PoolProgress(
            self.pool,
            actors,
            totals["busy_seconds"],
            int(totals["deaths"]),
            int(totals["calls"]),
            self.waited,
            int(totals["moved_bytes"]),
            int(totals["retries"]),
        )
