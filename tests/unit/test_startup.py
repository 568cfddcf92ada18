"""Where a node's beginning comes from: the store, or what it knew before."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv4Network, IPv6Network
from pathlib import Path
from threading import Event, Timer

import pytest

from cni.errors import ConfigError, StoreUnavailable
from cni.net.entries import NetState
from flanneld import startup
from flanneld.backend.vxlan import VxlanBackend
from flanneld.config import NetConf, parse_netconf, validate
from flanneld.health import Readiness
from flanneld.iface import ExternalInterface
from flanneld.lease import Attributes, Lease, Snapshot, Update
from flanneld.snapshot import NodeState
from flanneld.startup import Source

CONFIG = validate(parse_netconf('{"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan"}}', "test"), "test")
EXTERNAL = ExternalInterface(
    "eth0", 1500, IPv4Address("192.0.2.1"), None, IPv4Address("192.0.2.1"), None, "test"
)
MAC = "02:00:00:00:00:01"


def lease(subnet: str, public_ip: str, mac: str = MAC) -> Lease:
    data = f'{{"VNI":1,"VtepMAC":"{mac}"}}'
    return Lease(IPv4Network(subnet), None, Attributes(IPv4Address(public_ip), None, "vxlan", data))


OWN, PEER = lease("10.5.1.0/24", "192.0.2.1"), lease("10.5.2.0/24", "192.0.2.2")
SAVED = NodeState(1, 1000.0, "here", ("203.0.113.9", ""), CONFIG, EXTERNAL, OWN, (PEER,))
BACKEND = VxlanBackend.from_config(CONFIG, EXTERNAL, "test")
NOTHING: NetState = {}


@dataclass
class FakeStore:
    """Answers as told; `away` is how many more requests it does not answer."""

    away: int = 0
    config: NetConf = CONFIG
    held: Lease | None = OWN
    acquired: list[Attributes] = field(default_factory=list)
    name: str = "fake"

    def _answer(self) -> None:
        if self.away:
            self.away -= 1
            raise StoreUnavailable("no answer")

    def network_config(self) -> NetConf:
        self._answer()
        return self.config

    def public_ips(self) -> tuple[str, str]:
        self._answer()
        return "192.0.2.77", ""

    def stored(self, public_ip: object) -> Lease | None:
        self._answer()
        return self.held

    def acquire(self, config: NetConf, attrs: Attributes, previous: Lease | None) -> Lease:
        self._answer()
        self.acquired.append(attrs)
        return replace(self.held or OWN, attrs=attrs)

    def renew(self, lease: Lease) -> Lease:
        raise NotImplementedError

    def complete(self, lease: Lease) -> None:
        raise NotImplementedError

    def watch(self, stop: Event) -> Iterator[Update]:
        self._answer()
        yield Snapshot((OWN, PEER))

    def close(self) -> None:
        raise NotImplementedError


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "RESTORE_AFTER_S", 0.2)
    monkeypatch.setattr(startup, "_RETRY_LAST_S", 0.1)


def source(store: FakeStore, saved: NodeState | None = SAVED) -> Source:
    return Source(store, saved, Event(), Readiness())


def test_a_store_that_answers_is_believed_whatever_is_saved() -> None:
    found = source(FakeStore(config=replace(CONFIG, subnet_len=25)))
    assert found.config().subnet_len == 25
    assert found.public_ips() == ("192.0.2.77", "")
    assert found.own(BACKEND, CONFIG, NOTHING, None) == (OWN, True)
    assert found.peers(OWN) == (PEER,)
    assert found.restored == 0.0


def test_a_silent_store_is_replaced_by_what_is_saved_for_all_questions() -> None:
    store = FakeStore(away=1_000_000)
    found = source(store)
    assert found.config() == CONFIG
    asked = store.away
    assert found.public_ips() == ("203.0.113.9", "")
    assert found.own(BACKEND, CONFIG, NOTHING, OWN) == (OWN, True)
    assert found.peers(OWN) == (PEER,)
    assert found.restored == 1000.0
    assert store.away == asked  # it was asked no more


def test_a_short_silence_restores_nothing() -> None:
    found = source(FakeStore(away=1))
    assert found.config() == CONFIG
    assert found.restored == 0.0


def test_without_anything_saved_it_waits_until_the_store_answers() -> None:
    readiness = Readiness()
    found = Source(FakeStore(away=4), None, Event(), readiness)
    assert found.config() == CONFIG
    assert "waiting for the store (reading the network configuration): no answer" in readiness.text


def test_the_end_is_noticed_while_it_waits() -> None:
    stop = Event()
    Timer(0.3, stop.set).start()
    with pytest.raises(startup.Stopped):
        Source(FakeStore(away=1_000_000), None, stop, Readiness()).config()


def test_a_saved_lease_that_does_not_suit_the_configuration_is_not_restored() -> None:
    """Kubernetes mode: the configuration is a file, and somebody changed it."""
    other = parse_netconf('{"Network": "10.9.0.0/16", "Backend": {"Type": "vxlan"}}', "test")
    store = FakeStore(away=8, held=lease("10.9.1.0/24", "192.0.2.1"))
    found = source(store)
    own, known = found.own(BACKEND, other, NOTHING, None)
    assert (own.subnet, known) == (IPv4Network("10.9.1.0/24"), True)
    assert found.restored == 0.0


def test_the_mac_of_an_earlier_run_is_kept_when_the_store_has_forgotten_us() -> None:
    store = FakeStore(held=None)
    own, known = source(store).own(BACKEND, CONFIG, NOTHING, OWN)
    assert not known
    assert store.acquired[-1].backend_data == OWN.attrs.backend_data
    assert own.attrs.backend_data == OWN.attrs.backend_data


def test_the_lease_of_an_address_that_was_anothers_does_not_change_our_mac() -> None:
    """Two nodes swapped their addresses while they were down."""
    others = lease("10.5.2.0/24", "192.0.2.1", "02:00:00:00:00:02")
    store = FakeStore(held=others)
    source(store).own(BACKEND, CONFIG, NOTHING, OWN)
    assert store.acquired[-1].backend_data == OWN.attrs.backend_data


DUAL = replace(CONFIG, enable_ipv6=True, ipv6_network=IPv6Network("fd00::/48"))
DUAL_LEASE = replace(OWN, subnet6=IPv6Network("fd00:0:0:1::/64"))


@pytest.mark.parametrize(
    ("held", "config", "suits"),
    [
        (OWN, CONFIG, True),
        (DUAL_LEASE, DUAL, True),
        (OWN, DUAL, False),
        (DUAL_LEASE, CONFIG, False),
        (lease("10.6.1.0/24", "192.0.2.1"), CONFIG, False),
        (replace(DUAL_LEASE, subnet6=IPv6Network("fd01::/64")), DUAL, False),
        (OWN, replace(CONFIG, network=None), False),
    ],
)
def test_which_lease_suits_which_configuration(held: Lease, config: NetConf, suits: bool) -> None:
    assert startup.suits(held, config) is suits


def test_the_previous_lease_is_that_of_the_subnet_file_with_the_attributes_that_are_saved(
    tmp_path: Path,
) -> None:
    path = tmp_path / "subnet.env"
    assert startup.previous_lease(path, None) is None
    assert startup.previous_lease(path, SAVED) is OWN
    path.write_text("FLANNEL_SUBNET=10.5.1.1/24\n")
    assert startup.previous_lease(path, SAVED) is OWN
    assert startup.previous_lease(path, None) == Lease(OWN.subnet, None, Attributes())
    path.write_text("FLANNEL_SUBNET=10.5.7.1/24\n")
    assert startup.previous_lease(path, SAVED) == Lease(IPv4Network("10.5.7.0/24"), None, Attributes())


def test_a_lease_without_any_address_is_refused() -> None:
    nothing = replace(EXTERNAL, public_ip=None, address=None)
    backend = VxlanBackend.from_config(CONFIG, nothing, "test")
    with pytest.raises(ConfigError, match="public IP"):
        source(FakeStore()).own(backend, CONFIG, NOTHING, None)
