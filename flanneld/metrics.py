"""What the daemon counts, for Prometheus. Names are `flannel_...`; the text is served at /metrics."""

from __future__ import annotations

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    REGISTRY,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

CONTENT_TYPE = CONTENT_TYPE_LATEST
disable_created_metrics()  # type: ignore[no-untyped-call] # one more line per counter, of no use to anybody

READY = Gauge("flannel_ready", "1 when the node's network is in order, as /readyz says")
LEASES = Gauge("flannel_leases", "Leases known, our own included")
PEERS_PASSED_OVER = Gauge("flannel_peers_passed_over", "Peers whose lease cannot be used")
LEASE_WRITTEN = Gauge("flannel_lease_written_timestamp_seconds", "When our lease was last written")
LEASE_EXPIRES = Gauge("flannel_lease_expires_timestamp_seconds", "When our lease ends, 0 if it never does")

STORE_UP = Gauge("flannel_store_up", "1 while the store of leases answers")
STORE_FAILURES = Counter("flannel_store_failures", "Requests or watches that the store did not serve")
RESTORED = Gauge("flannel_restored", "1 while the node runs on what it knew before its last start")

RECONCILE_S = Histogram(
    "flannel_reconcile_duration_seconds",
    "Time to bring the kernel to what is wanted: all of it (network) or one lease (peer)",
    ["what"],
    buckets=(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0),
)
OPERATIONS = Counter("flannel_kernel_operations", "Entries written to or deleted from the kernel", ["verb"])
REFUSALS = Counter("flannel_kernel_refusals", "Operations that the kernel did not carry out", ["verb"])
DRIFT = Counter("flannel_drift", "Entries of ours that somebody else changed, deleted or added", ["kind"])
DRIFT_REPAIRED = Counter("flannel_drift_repaired", "Of these, how many were put right")
FIREWALL_REPAIRS = Counter("flannel_firewall_repairs", "Times that the firewall rules had to be put back")
STARTS_OVER = Counter("flannel_starts_over", "Times that the node was set up anew without a restart")

QUEUE_DEPTH = Gauge("flannel_queue_depth", "Keys that wait for the worker")
QUEUE_RETRIES = Counter("flannel_queue_retries", "Keys put back after a failure")


for _verb in ("put", "drop"):
    OPERATIONS.labels(_verb)
    REFUSALS.labels(_verb)
for _what in ("network", "peer"):
    RECONCILE_S.labels(_what)


def render() -> bytes:
    """Everything in Prometheus' text format."""
    return generate_latest(REGISTRY)
