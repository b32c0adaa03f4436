"""Numbers for Prometheus."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterable
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from agentos.actors import Actors
from agentos.network.gate import Traffic
from agentos.server.settings import Counters

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"
_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 60, 600)
_BOUNDS = (*(str(float(bound)) for bound in _BUCKETS), "+Inf")


class Metrics:
    """The metrics of one application."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.counters = Counters()
        self.in_flight = 0
        """Actions that are not answered yet."""
        self._times: dict[str, _Times] = {}
        self.registry.register(_ActionTimes(self._times))
        self._failures = Counter(
            "agentos_action_failures", "Actions that failed.", ["action", "code"], registry=self.registry
        )
        self._boots = Histogram(
            "agentos_boot_seconds", "Time that boots took.", buckets=_BUCKETS, registry=self.registry
        )
        in_flight = Gauge(
            "agentos_actions_in_flight", "Actions that are not answered yet.", registry=self.registry
        )
        in_flight.set_function(lambda: self.in_flight)
        self._limits = Counter(
            "agentos_limits_reached",
            "Bursts in which VMs came to a limit.",
            ["limit"],
            registry=self.registry,
        )

    def watch(self, actors: Actors) -> None:
        """Include the numbers of these actors."""
        actors.on_booted = self._boots.observe
        actors.on_limit = lambda limit: self._limits.labels(limit).inc()
        self.registry.register(_Live(actors, self.counters))

    def ended(self, action: str, seconds: float, failure: str | None) -> None:
        """An action ended, which took so many `seconds`; `failure` is the code of its error."""
        times = self._times.get(action)
        if times is None:
            times = self._times[action] = _Times()
        times.seconds += seconds
        times.counts[bisect_left(_BUCKETS, seconds)] += 1
        if failure is not None:
            self._failures.labels(action, failure).inc()

    def text(self) -> bytes:
        """All of them, as Prometheus reads them."""
        return generate_latest(self.registry)


class _Times:
    """How long the actions of one name took, as plain numbers: every action adds to them."""

    __slots__ = ("counts", "seconds", "since")

    def __init__(self) -> None:
        self.since = time.time()
        self.seconds = 0.0
        self.counts = [0] * (len(_BUCKETS) + 1)
        """Of those that took at most a bucket's bound, and more than that of the one before it."""


class _ActionTimes:
    """Those of all actions, as a histogram when it is asked for."""

    def __init__(self, times: dict[str, _Times]) -> None:
        self._times = times

    def collect(self) -> Iterable[Metric]:
        name = "agentos_action_seconds"
        family = HistogramMetricFamily(name, "Time that actions took.", labels=["action"])
        for action, times in list(self._times.items()):
            buckets = list(zip(_BOUNDS, accumulate(times.counts), strict=True))
            family.add_metric([action], buckets, times.seconds)
            family.add_sample(f"{name}_created", {"action": action}, times.since)
        yield family


class _Live:
    """What is counted elsewhere, read when it is asked for."""

    def __init__(self, actors: Actors, counters: Counters) -> None:
        self._actors = actors
        self._counters = counters

    def collect(self) -> Iterable[Metric]:
        counters = self._counters
        yield GaugeMetricFamily("agentos_vms_running", "VMs that run.", len(self._actors.live))
        yield GaugeMetricFamily("agentos_vms", "VMs, running or asleep.", self._actors.store.count())
        yield GaugeMetricFamily("agentos_connections", "Open WebSockets.", counters.connections)
        yield GaugeMetricFamily("agentos_previews", "Previews under way.", counters.previews)
        yield CounterMetricFamily("agentos_event_frames", "Events sent.", counters.event_frames)
        yield CounterMetricFamily("agentos_event_bytes", "Bytes of the events sent.", counters.event_bytes)
        retention = self._actors.host.retention()
        yield GaugeMetricFamily(
            "agentos_exited_log_bytes",
            "Output kept for replay of processes that have ended.",
            retention.kept.replayed,
        )
        yield GaugeMetricFamily(
            "agentos_lossless_bytes",
            "Output of lossless processes that is kept until it is read.",
            retention.kept.unread + retention.kept.handed_out,
        )
        yield from _network(self._actors.host.traffic)
        yield CounterMetricFamily("agentos_gaps", "Times that a subscriber fell behind.", counters.gaps)


def _network(traffic: Traffic) -> Iterable[Metric]:
    """What VMs have had of the network."""
    prefix = "agentos_network"
    yield GaugeMetricFamily(f"{prefix}_open_connections", "Connections out of VMs.", traffic.open)
    yield CounterMetricFamily(f"{prefix}_connections", "Connections that VMs made.", traffic.connections)
    yield CounterMetricFamily(f"{prefix}_failures", "Allowed, but not reached.", traffic.failed)
    yield CounterMetricFamily(f"{prefix}_sent_bytes", "Bytes that VMs sent.", traffic.sent_bytes)
    yield CounterMetricFamily(f"{prefix}_received_bytes", "Bytes that VMs received.", traffic.received_bytes)
    yield CounterMetricFamily(f"{prefix}_lookups", "Names that VMs asked for.", traffic.lookups)
    refused = CounterMetricFamily(f"{prefix}_refused", "What VMs were refused.", labels=["reason"])
    for reason, count in sorted(traffic.refused.items()):
        refused.add_metric([reason], count)
    yield refused
