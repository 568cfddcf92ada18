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

# Label values that a caller chooses freely are counted as "other".
_PLUGINS = frozenset(("flannel", "bridge", "host-local", "portmap", "loopback"))
_COMMANDS = frozenset(("ADD", "DEL", "CHECK", "GC", "STATUS", "VERSION"))
_CODES = frozenset((1, 2, 3, 4, 5, 6, 7, 8, 11, 50, 51, 999))
_MOST_NETWORKS = 64
_CNI_REQUESTS = Counter(
    "flannel_cni_requests",
    "CNI calls: ok, declined (left to the plugin), broken (no proper request) or the number of the error",
    ["plugin", "command", "outcome"],
)
_CNI_S = Histogram(
    "flannel_cni_duration_seconds",
    "Time from a CNI call's arrival to its answer",
    ["command"],
    buckets=(0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0, 5.0),
)
CNI_IN_FLIGHT = Gauge("flannel_cni_in_flight", "CNI calls that are being served")
_CNI_ADDRESSES = Gauge("flannel_cni_addresses", "Addresses of a range set of a network", ["network", "set"])
_CNI_ADDRESSES_USED = Gauge("flannel_cni_addresses_used", "Of these, how many are taken", ["network", "set"])
_networks: set[tuple[str, int]] = set()


def cni_served(plugin: str, command: str, outcome: str | int, duration_s: float) -> None:
    """Count a CNI call; `outcome` is a word, or the number of the CNI error."""
    command = command if command in _COMMANDS else "other"
    plugin = plugin if plugin in _PLUGINS else "other"
    known = not isinstance(outcome, int) or outcome in _CODES
    _CNI_REQUESTS.labels(plugin, command, outcome if known else "other").inc()
    _CNI_S.labels(command).observe(duration_s)


def cni_broken() -> None:
    """Count what was no proper request."""
    _CNI_REQUESTS.labels("other", "other", "broken").inc()


def cni_addresses(network: str, range_set: int, used: int, size: int) -> None:
    """How many addresses of a network's range set are taken; of the first 64 sets that are told of."""
    key = (network, range_set)
    if key not in _networks and len(_networks) >= _MOST_NETWORKS:
        return
    _networks.add(key)
    _CNI_ADDRESSES.labels(network, range_set).set(size)
    _CNI_ADDRESSES_USED.labels(network, range_set).set(used)


for _verb in ("put", "drop"):
    OPERATIONS.labels(_verb)
    REFUSALS.labels(_verb)
for _what in ("network", "peer"):
    RECONCILE_S.labels(_what)
for _command in ("ADD", "DEL"):
    _CNI_S.labels(_command)


def render() -> bytes:
    """Everything in Prometheus' text format."""
    return generate_latest(REGISTRY)
