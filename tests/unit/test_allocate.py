"""Choosing a subnet, held against a naive twin that asks netaddr about every subnet of the range."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

import netaddr  # type: ignore[import-untyped] # it ships no types
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cni.errors import InternalError, OutOfSubnets
from flanneld.config import NetConf, validate
from flanneld.lease import Attributes, Lease
from flanneld.subnet import allocate
from flanneld.subnet.allocate import Create, Keep

OWN = IPv4Address("1.2.3.4")
OTHER = Attributes(IPv4Address("9.9.9.9"))


def subnets(base: str, lengths: tuple[int, int]) -> st.SearchStrategy[IPv4Network]:
    """Networks of all those lengths inside and around `base`."""
    around = IPv4Network(base).supernet(1)

    def at(offset: int, length: int) -> IPv4Network:
        return IPv4Network((int(around.network_address) + offset, length), strict=False)

    return st.builds(at, st.integers(0, around.num_addresses - 1), st.integers(*lengths))


def subnets6(base: str, lengths: tuple[int, int]) -> st.SearchStrategy[IPv6Network]:
    around = IPv6Network(base).supernet(1)

    def at(offset: int, length: int) -> IPv6Network:
        return IPv6Network((int(around.network_address) + offset, length), strict=False)

    return st.builds(at, st.integers(0, around.num_addresses - 1), st.integers(*lengths))


@st.composite
def configs(draw: st.DrawFn) -> NetConf:
    """10.20.0.0/18 and fd00:20::/48, cut into at most 64 subnets each, with a range somewhere inside."""
    length, length6 = draw(st.integers(20, 24)), draw(st.integers(50, 54))
    cut = list(IPv4Network("10.20.0.0/18").subnets(new_prefix=length))
    cut6 = list(IPv6Network("fd00:20::/48").subnets(new_prefix=length6))
    low, high = sorted(draw(st.tuples(*2 * [st.sampled_from(range(len(cut)))])))
    low6, high6 = sorted(draw(st.tuples(*2 * [st.sampled_from(range(len(cut6)))])))
    enabled = draw(st.sampled_from([(True, False), (True, True), (False, True)]))
    conf = NetConf(
        network=IPv4Network("10.20.0.0/18"),
        ipv6_network=IPv6Network("fd00:20::/48"),
        enable_ipv4=enabled[0],
        enable_ipv6=enabled[1],
        subnet_len=length,
        subnet_min=cut[low].network_address,
        subnet_max=cut[high].network_address,
        ipv6_subnet_len=length6,
        ipv6_subnet_min=cut6[low6].network_address,
        ipv6_subnet_max=cut6[high6].network_address,
    )
    return validate(conf, "test")


LEASES = st.lists(
    st.builds(
        Lease,
        subnets("10.20.0.0/18", (17, 30)),
        st.none() | subnets6("fd00:20::/48", (48, 64)),
        st.builds(Attributes, st.sampled_from([OWN, *(IPv4Address(f"9.9.9.{n}") for n in range(9))])),
    ),
    max_size=12,
)


def naive(config: NetConf, leases: list[Lease]) -> list[IPv4Network]:
    assert config.subnet_min and config.subnet_max
    taken = netaddr.IPSet([str(lease.subnet) for lease in leases])
    step = 1 << (32 - config.subnet_len)
    starts = range(int(config.subnet_min), int(config.subnet_max) + 1, step)
    return [
        subnet
        for subnet in (IPv4Network((start, config.subnet_len)) for start in starts)
        if taken.isdisjoint(netaddr.IPSet([str(subnet)]))
    ]


def naive6(config: NetConf, leases: list[Lease]) -> list[IPv6Network]:
    assert config.ipv6_subnet_min and config.ipv6_subnet_max
    taken = [netaddr.IPNetwork(str(lease.subnet6)) for lease in leases if lease.subnet6]
    step = 1 << (128 - config.ipv6_subnet_len)
    found = []
    start = int(config.ipv6_subnet_min)
    while start <= int(config.ipv6_subnet_max):
        subnet = netaddr.IPNetwork((start, config.ipv6_subnet_len), version=6)
        if not any(subnet in other or other in subnet for other in taken):
            found.append(IPv6Network((start, config.ipv6_subnet_len)))
        start += step
    return found


def naive_free(config: NetConf, leases: list[Lease]) -> tuple[list[IPv4Network], list[IPv6Network]]:
    """What may be handed out beside `leases`, in the enabled families."""
    return (
        naive(config, leases) if config.enable_ipv4 else [],
        naive6(config, leases) if config.enable_ipv6 else [],
    )


@given(configs(), LEASES, st.integers(1, 70))
def test_candidates_are_those_of_the_naive_twin(config: NetConf, leases: list[Lease], limit: int) -> None:
    v4 = naive(config, leases)[:limit] if config.enable_ipv4 else []
    v6 = naive6(config, leases)[:limit] if config.enable_ipv6 else []
    assert allocate.candidates(config, leases, limit) == v4
    assert allocate.candidates6(config, leases, limit) == v6


@given(configs(), LEASES, st.none() | LEASES.map(lambda many: many[0] if many else None), st.randoms())
def test_what_is_chosen_fits_and_is_free(
    config: NetConf, leases: list[Lease], previous: Lease | None, rng: random.Random
) -> None:
    mine = [lease for lease in leases if lease.attrs.public_ip == OWN]
    others = [lease for lease in leases if lease.attrs.public_ip != OWN]
    try:
        decision = allocate.choose(config, leases, OWN, previous, rng)
    except OutOfSubnets:
        assert (config.enable_ipv4 and not naive(config, others)) or (
            config.enable_ipv6 and not naive6(config, others)
        )
        return
    match decision:
        case Keep(lease):
            assert lease in mine
            assert allocate.fits(config, lease)
        case Create(subnet, subnet6, drop, note):
            made = Lease(subnet, subnet6, Attributes(OWN))
            assert allocate.fits(config, made)
            assert allocate.taker(made, others) is None
            assert drop == tuple(mine)
            assert not any(allocate.fits(config, lease) for lease in mine)
            given = previous or Lease(None, None, Attributes())
            assert bool(note) is (
                (config.enable_ipv4 and given.subnet not in (None, subnet))
                or (config.enable_ipv6 and given.subnet6 not in (None, subnet6))
            )
            # Whatever can be kept is kept, in each family for itself; what the pods use now comes first.
            free, free6 = naive_free(config, others)
            had = [x.subnet for x in (given, *mine) if x.subnet in free]
            had6 = [x.subnet6 for x in (given, *mine) if x.subnet6 in free6]
            assert not had or subnet == had[0]
            assert not had6 or subnet6 == had6[0]


@given(configs(), LEASES)
def test_a_lease_fits_exactly_if_it_could_have_been_handed_out(config: NetConf, leases: list[Lease]) -> None:
    pool = naive(config, []) if config.enable_ipv4 else [None]
    pool6 = naive6(config, []) if config.enable_ipv6 else [None]
    for lease in leases:
        for seen in (lease, replace(lease, subnet6=None), replace(lease, subnet=None)):
            assert allocate.fits(config, seen) is (seen.subnet in pool and seen.subnet6 in pool6)


def conf(network: str = "10.3.0.0/16", low: str = "10.3.1.0", high: str = "10.3.25.0") -> NetConf:
    return validate(
        NetConf(IPv4Network(network), subnet_min=IPv4Address(low), subnet_max=IPv4Address(high)), "test"
    )


def held(*numbers: int) -> list[Lease]:
    """Upstream's test registry: all of one node."""
    return [Lease(IPv4Network(f"10.3.{n}.0/24"), None, Attributes(IPv4Address("1.1.1.1"))) for n in numbers]


UPSTREAM = held(1, 2, 4, 5, 31)


def test_upstreams_registry() -> None:
    free = {f"10.3.{n}.0/24" for n in range(1, 26)} - {
        "10.3.1.0/24",
        "10.3.2.0/24",
        "10.3.4.0/24",
        "10.3.5.0/24",
    }
    assert {str(n) for n in allocate.candidates(conf(), UPSTREAM)} == free
    chosen = set()
    for seed in range(300):
        decision = allocate.choose(conf(), UPSTREAM, OWN, None, random.Random(seed))
        assert isinstance(decision, Create)
        chosen.add(str(decision.subnet))
    assert chosen == free


def test_the_first_own_lease_that_fits_is_kept() -> None:
    own = IPv4Address("1.1.1.1")
    assert allocate.choose(conf(), UPSTREAM, own, None, random.Random(1)) == Keep(UPSTREAM[0])
    assert allocate.choose(conf(), UPSTREAM[::-1], own, None, random.Random(1)) == Keep(UPSTREAM[3])


@pytest.mark.parametrize(
    ("previous", "note"),
    [
        ("10.3.6.0/24", ""),
        ("10.4.1.0/24", "previous subnet 10.4.1.0/24 does not fit SubnetLen 24 from 10.3.1.0 to 10.3.25.0"),
        ("10.3.6.0/25", "previous subnet 10.3.6.0/25 does not fit SubnetLen 24 from 10.3.1.0 to 10.3.25.0"),
        ("10.3.4.0/24", "previous subnet 10.3.4.0/24 is taken: 10.3.4.0-24 belongs to 1.1.1.1"),
    ],
)
def test_the_previous_subnet(previous: str, note: str) -> None:
    before = Lease(IPv4Network(previous), None, Attributes())
    decision = allocate.choose(conf(), UPSTREAM, OWN, before, random.Random(1))
    assert isinstance(decision, Create)
    assert decision.note == note
    assert (decision.subnet == before.subnet) is (note == "")


FIVE, FIVE6 = IPv4Network("10.3.5.0/24"), IPv6Network("fd00:3:0:5::/64")
DUAL = replace(conf(), enable_ipv6=True, ipv6_network=IPv6Network("fd00:3::/48"))
ONLY6 = replace(DUAL, enable_ipv4=False)


@pytest.mark.parametrize(
    ("config", "held_now", "subnet", "subnet6"),
    [
        (DUAL, (FIVE, None), FIVE, None),
        (DUAL, (None, FIVE6), None, FIVE6),
        (conf(), (FIVE, FIVE6), FIVE, None),
        (ONLY6, (FIVE, FIVE6), None, FIVE6),
    ],
)
@pytest.mark.parametrize("known_from", ["store", "subnet file"])
def test_a_family_that_comes_or_goes_leaves_the_other_its_subnet(
    config: NetConf,
    held_now: tuple[IPv4Network | None, IPv6Network | None],
    subnet: IPv4Network | None,
    subnet6: IPv6Network | None,
    known_from: str,
) -> None:
    config = validate(config, "test")
    before = Lease(*held_now, Attributes(OWN))
    stored, previous = (
        ([before], None) if known_from == "store" else ([], replace(before, attrs=Attributes()))
    )
    decision = allocate.choose(config, stored, OWN, previous, random.Random(1))
    assert isinstance(decision, Create)
    assert (decision.drop, decision.note) == (tuple(stored), "")
    assert decision.subnet == subnet if subnet else bool(decision.subnet) is config.enable_ipv4
    assert decision.subnet6 == subnet6 if subnet6 else bool(decision.subnet6) is config.enable_ipv6


def test_what_the_pods_use_comes_before_what_the_store_remembers() -> None:
    stored = Lease(FIVE, None, Attributes(OWN))
    before = Lease(IPv4Network("10.3.6.0/24"), None, Attributes())
    decision = allocate.choose(validate(DUAL, "test"), [stored], OWN, before, random.Random(1))
    assert isinstance(decision, Create)
    assert (decision.subnet, decision.drop, decision.note) == (before.subnet, (stored,), "")


def test_each_family_of_the_previous_subnet_has_its_own_reason() -> None:
    config = validate(DUAL, "test")
    other = Lease(None, IPv6Network("fd00:3:0:4::/62"), OTHER)
    before = Lease(IPv4Network("10.4.1.0/24"), FIVE6, Attributes())
    decision = allocate.choose(config, [other], OWN, before, random.Random(1))
    assert isinstance(decision, Create)
    assert decision.note == (
        "previous subnet 10.4.1.0/24 does not fit SubnetLen 24 from 10.3.1.0 to 10.3.25.0;"
        " previous subnet fd00:3:0:5::/64 is taken: fd00:3:0:4::-62 belongs to 9.9.9.9"
    )


def test_a_node_is_known_by_ipv6_only_where_it_has_no_ipv4() -> None:
    v6 = IPv6Address("fd01::1")
    lease = Lease(IPv4Network("10.3.1.0/24"), None, Attributes(OWN, v6))
    assert allocate.owner(lease.attrs) == OWN
    assert allocate.owner(Attributes(None, v6)) == v6
    assert allocate.holds(lease, OWN) and allocate.holds(lease, v6)
    assert not allocate.holds(lease, IPv4Address("1.2.3.5"))
    assert not allocate.holds(Lease(lease.subnet, None, Attributes()), OWN)
    assert allocate.owner_text(Lease(lease.subnet, None, Attributes())) == "a node without public IP"
    with pytest.raises(InternalError):
        allocate.owner(Attributes())


def test_out_of_subnets_names_the_remedy() -> None:
    narrow = conf(high="10.3.2.0")
    with pytest.raises(OutOfSubnets) as error:
        allocate.choose(narrow, UPSTREAM, OWN, None, random.Random(1))
    assert str(error.value) == (
        "no free subnet is left in 10.3.0.0/16 (SubnetLen 24 from 10.3.1.0 to 10.3.2.0, 5 leases); widen"
        " Network or the range SubnetMin to SubnetMax, raise SubnetLen,"
        " or delete leases of nodes that are gone"
    )


def test_a_configuration_that_was_not_validated_is_our_bug() -> None:
    with pytest.raises(InternalError):
        allocate.candidates(NetConf(IPv4Network("10.0.0.0/8")), [])


def test_the_last_subnet_of_the_address_space() -> None:
    config = validate(NetConf(IPv4Network("255.255.0.0/16")), "test")
    leases = [Lease(n, None, OTHER) for n in list(IPv4Network("255.255.0.0/16").subnets(new_prefix=24))[:-1]]
    assert allocate.candidates(config, leases) == [IPv4Network("255.255.255.0/24")]


def test_ten_thousand_leases_in_a_slash_eight_take_no_time() -> None:
    """Some 50 ms; testing each subnet against each lease takes minutes."""
    config = validate(NetConf(IPv4Network("10.0.0.0/8")), "test")
    every = IPv4Network("10.0.0.0/8").subnets(new_prefix=24)
    leases = [Lease(next(every), None, OTHER) for _ in range(10_000)]
    random.Random(1).shuffle(leases)
    began = time.monotonic()
    free = allocate.candidates(config, leases)
    assert time.monotonic() - began < 1
    assert free[0] == IPv4Network("10.39.16.0/24")
    assert len(free) == 100


def test_an_ipv6_range_of_astronomic_size() -> None:
    config = validate(
        NetConf(enable_ipv4=False, enable_ipv6=True, ipv6_network=IPv6Network("fd00::/16")), "test"
    )
    wide = Lease(None, IPv6Network("fd00::/17"), OTHER)
    assert allocate.candidates6(config, [wide], 1) == [IPv6Network("fd00:8000::/64")]
