"""Kernel states as hypothesis makes them: every entry lives on a link of the state, as in a kernel."""

from __future__ import annotations

from hypothesis import strategies as st

from cni.net.entries import Address, Entry, FdbEntry, Key, Link, Neighbour, Route, Vxlan, state

# Few names, numbers and addresses, so that two states drawn from them often share keys.
NAMES = ("flannel.1", "flannel-v6.1", "flannel.7")
MACS = ("02:00:00:00:00:01", "02:00:00:00:00:02", "02:00:00:00:00:03")
SUBNETS = ("10.244.1.0", "10.244.2.0", "10.244.3.0")
PUBLIC_IPS = ("192.0.2.1", "192.0.2.2", "2001:db8::1")


@st.composite
def links(draw: st.DrawFn, name: str) -> Link:
    vxlan = Vxlan(
        vni=draw(st.sampled_from((1, 7))),
        port=draw(st.sampled_from((8472, 4789))),
        local=draw(st.sampled_from(PUBLIC_IPS)),
        underlay="eth0",
        gbp=draw(st.booleans()),
    )
    mtu, mac, up = draw(st.sampled_from((1400, 1450))), draw(st.sampled_from(MACS)), draw(st.booleans())
    return Link(name, mtu, mac, up, vxlan)


def entries_on(name: str) -> st.SearchStrategy[Entry]:
    subnet, mac, public_ip = st.sampled_from(SUBNETS), st.sampled_from(MACS), st.sampled_from(PUBLIC_IPS)
    return st.one_of(
        subnet.map(lambda text: Address(name, f"{text}/32")),
        st.builds(Neighbour, st.just(name), subnet, mac),
        st.builds(FdbEntry, st.just(name), mac, public_ip),
        st.builds(
            lambda dst, via, onlink, metric: Route(name, f"{dst}/24", via, onlink, metric),
            subnet,
            subnet,
            st.booleans(),
            st.sampled_from((0, 1024)),
        ),
    )


@st.composite
def kernel_states(draw: st.DrawFn) -> dict[Key, Entry]:
    """A state that a kernel can hold: entries on existing links, one FDB destination for each MAC."""
    found: list[Entry] = []
    for name in draw(st.lists(st.sampled_from(NAMES), unique=True)):
        found.append(draw(links(name)))
        found += draw(st.lists(entries_on(name), max_size=8))
    destinations = {(entry.link, entry.mac): entry for entry in found if isinstance(entry, FdbEntry)}
    shuffled = draw(st.permutations(found))
    return state(e for e in shuffled if not isinstance(e, FdbEntry) or destinations[e.link, e.mac] == e)
