"""What actions took, as Prometheus reads it."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Histogram, generate_latest

from agentos.server.metrics import _BUCKETS, Metrics


def test_times_of_actions() -> None:
    """The lines are those of the library's own histogram: on a bound, below all, above all, and of odd names."""
    registry = CollectorRegistry()
    wanted = Histogram(
        "agentos_action_seconds", "Time that actions took.", ["action"], buckets=_BUCKETS, registry=registry
    )
    metrics = Metrics()
    for action, seconds in (
        ("exec", 0.0), ("exec", 0.001), ("exec", 0.0011), ("exec", 600.0), ("exec", 601.5), ("stat", 0.07),
        ('a"b\\c', 3.0),
    ):  # fmt: skip
        wanted.labels(action).observe(seconds)
        metrics.ended(action, seconds, None)
    got = _lines(metrics.text(), "agentos_action_seconds")
    assert got == _lines(generate_latest(registry), "agentos_action_seconds")
    assert 'agentos_action_seconds_bucket{action="exec",le="0.001"} 2.0' in got


def _lines(text: bytes, name: str) -> list[str]:
    """Those of one metric; when a series began is another moment each time."""
    lines = [line for line in text.decode().splitlines() if name in line]
    return [line.rpartition(" ")[0] if f"{name}_created{{" in line else line for line in lines]


def test_in_flight() -> None:
    """The gauge is the number at the moment when it is asked for."""
    metrics = Metrics()
    for number in (0, 3, 1):
        metrics.in_flight = number
        assert f"agentos_actions_in_flight {number}.0" in metrics.text().decode().splitlines()
