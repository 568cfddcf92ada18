"""host-local's configuration. The texts are tested beside the real one; here is what it lacks."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cni.errors import CniError
from cni.ipam.config import IpamConfig, Place, address_text, count_sets, resolver
from cni.spec import gojson

JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.sampled_from(["", "10.0.0.0/29", "fd00::1", "x"])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["subnet", "rangeStart", "gateway", "ips", "cni", "dst", "ipRanges", "ranges"]),
            inner,
            max_size=3,
        ),
    ),
    max_leaves=6,
)


def record(top: dict[str, Any] | None = None, **ipam: Any) -> gojson.Object:
    document = {"name": "net", "cniVersion": "1.0.0", "ipam": {"type": "host-local", **ipam}, **(top or {})}
    return gojson.load_object(gojson.dumps(document))


def test_sets_are_in_the_order_of_the_results() -> None:
    document = record(
        {"runtimeConfig": {"ipRanges": [[{"subnet": "10.3.0.0/24"}]]}},
        subnet="10.1.0.0/24",
        ranges=[[{"subnet": "fd00::/64"}], [{"subnet": "10.2.0.0/24"}]],
    )
    made = IpamConfig(document, "")
    subnets = [str(one.ranges[0].subnet) for one in made.sets]
    assert subnets == ["10.3.0.0/24", "10.1.0.0/24", "fd00::/64", "10.2.0.0/24"]
    assert count_sets(document) == 4


def test_wishes_are_in_order_and_come_once() -> None:
    top = {
        "args": {"cni": {"ips": ["10.1.0.7/16", "10.1.0.5"]}},
        "runtimeConfig": {"ips": ["::ffff:10.1.0.7", "fd00::9"]},
    }
    made = IpamConfig(record(top, subnet="10.1.0.0/24"), "IgnoreUnknown=1;X=y;IP=10.1.0.5")
    assert [address_text(one) for one in made.requested] == ["10.1.0.5", "10.1.0.7", "fd00::9"]


def test_the_store_is_below_the_default_directory() -> None:
    assert Place(record()).store == "/var/lib/cni/networks/net"
    assert Place(record(dataDir="")).store == "/var/lib/cni/networks/net"
    assert Place(record(dataDir="/a/")).store == "/a/net"


@pytest.mark.parametrize(
    ("ipam", "text"),
    [
        ({"subnet": 5}, "json: subnet must be a string, found number 5"),
        ({"ranges": {}}, "json: ranges must be an array, found object"),
        ({"ranges": [{}]}, "json: ranges must hold arrays of ranges, found object"),
        ({"ranges": [["x"]]}, "json: a range of ranges must be an object, found string"),
        ({"subnet": "10.0.0.0/29", "routes": ["x"]}, "routes must hold objects, found string"),
        ({"dataDir": []}, "json: dataDir must be a string, found array"),
    ],
)
def test_a_wrong_type_is_named(ipam: dict[str, Any], text: str) -> None:
    with pytest.raises(CniError) as failure:
        IpamConfig(record(**ipam), "")
    assert (failure.value.code, failure.value.msg) == (999, text)


def test_a_null_wish_is_refused_where_upstream_panics() -> None:
    with pytest.raises(CniError, match=r"^json: ips must hold strings, found null$"):
        IpamConfig(record({"runtimeConfig": {"ips": [None]}}, subnet="10.0.0.0/29"), "")


@given(
    ipam=st.dictionaries(st.sampled_from(["subnet", "ranges", "routes", "gateway", "resolvConf"]), JSON),
    top=JSON,
)
def test_whatever_is_written_gives_a_configuration_or_an_error(ipam: dict[str, Any], top: Any) -> None:
    document = record({"runtimeConfig": top, "args": top}, **ipam)
    Place(document)  # DEL must not stumble over what is not its business
    count_sets(document)
    try:
        made = IpamConfig(document, "")
    except CniError:
        return  # any other error is a failure of the test
    assert count_sets(document) == len(made.sets) > 0


def test_resolver_takes_four_keywords() -> None:
    text = "#nameserver 9.9.9.9\n;x y\n  nameserver 192.0.2.1 trailing\nnameserver\nnameserver fd00::53\n"
    text += "domain a\ndomain b.example c\nsearch x y\noptions ndots:5\nsearch z\nfoo bar\n"
    assert resolver(text) == {
        "nameservers": ["192.0.2.1", "fd00::53"],
        "domain": "b.example",
        "search": ["x", "y", "z"],
        "options": ["ndots:5"],
    }
    assert resolver("# nothing\n") == {}
