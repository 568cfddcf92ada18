"""What `tests.fuzz.cni` feeds the CNI plugins: netconfs, environments, files, mutated along their grammar.

Everything of a case follows from its seed. The places are those of a world (`tests.fuzz.cni_world`).
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

BASE = "/run/fz"
PODS = ("/run/netns/pod0", "/run/netns/pod1")
VERSIONS = ("0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
PLUGINS = ("flannel", "flannel", "bridge", "bridge", "host-local", "portmap", "loopback")
FOREIGN = "foreign1"  # a container whose state must survive whatever happens to others

_SUBNET_ENV = {
    "FLANNEL_NETWORK": "10.1.0.0/16",
    "FLANNEL_SUBNET": "10.1.17.1/24",
    "FLANNEL_MTU": "1450",
    "FLANNEL_IPMASQ": "true",
}
_IPV6_ENV = {"FLANNEL_IPV6_NETWORK": "fd00:1::/48", "FLANNEL_IPV6_SUBNET": "fd00:1:0:17::1/64"}


class Raw(str):
    """JSON text that is written as it is."""

    __slots__ = ()


_WORDS = (
    "",
    "x",
    "lo",
    ".",
    "..",
    "/",
    "a b",
    "a\nb",
    "a:b",
    "eth0\0",
    "\0",
    "\ud800",
    "\udfff\udfff",
    "é",
    "日本語",
)
_LONG = ("A" * 16, "é" * 8, "x" * 256, "y" * 5000, "%s%n", "\u2028<&>", "𝒳" * 4, "0", "null", "1.0.0", "-")
_NUMBERS = (
    "0",
    "-0",
    "-1",
    "1",
    "1450.0",
    "1e3",
    "1E+2",
    "65535",
    "65536",
    "4294967295",
    "4294967296",
    "1e400",
)
_MORE_NUMBERS = (
    "9223372036854775807",
    "9223372036854775808",
    "-9223372036854775809",
    "1" * 400,
    "0.1",
    "1e-7",
)
_NO_NUMBERS = ("NaN", "Infinity", "-Infinity", "01", "+1", "0x10", ".5", "1.", "--1", "true1", "nul")
_ADDRESSES = (
    "10.1.2.3",
    "10.1.2.3/24",
    "10.1.2.0/33",
    "010.1.2.3",
    "fe80::1%eth0",
    "::ffff:10.1.2.3",
    "::/0",
    "/",
)
_MORE_ADDRESSES = (
    "0.0.0.0/0",
    "255.255.255.255/32",
    "10.1.17.0/31",
    "fd00::/127",
    "1::2::3",
    "10.1.2",
    "::1/129",
)
_MACS = (
    "0a:58:0a:01:11:05",
    "0A-58-0A-01-11-05",
    "01:00:5e:00:00:01",
    "00:00:00:00:00:00",
    "zz",
    "0a:58:0a:01:11",
)


def text(rng: random.Random) -> str:
    """A string that somebody may put anywhere."""
    pool = rng.choice((_WORDS, _LONG, _ADDRESSES, _MORE_ADDRESSES, _MACS, VERSIONS, PODS))
    return rng.choice(pool)


def junk(rng: random.Random, depth: int = 0) -> Any:
    """A value of any JSON type, or what is no JSON."""
    roll = rng.random()
    if roll < 0.3:
        return text(rng)
    if roll < 0.55:
        return Raw(rng.choice(rng.choice((_NUMBERS, _NUMBERS, _MORE_NUMBERS))))
    if roll < 0.58:
        return Raw(rng.choice(_NO_NUMBERS))
    if roll < 0.7:
        return rng.choice((None, True, False))
    if roll < 0.73:
        return _nested(rng)
    if depth > 2:
        return []
    if roll < 0.86:
        return [junk(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {text(rng): junk(rng, depth + 1) for _ in range(rng.randrange(3))}


def _nested(rng: random.Random) -> Raw:
    levels = rng.choice((5, 50, 300, 900, 1200, 20000)) if rng.random() < 0.3 else rng.randrange(2, 40)
    opening, closing = rng.choice((("[", "]"), ('{"a":', "}")))
    return Raw(opening * levels + "1" + closing * levels)


def write(value: Any) -> str:
    """JSON text; lone surrogates and Raw stay what they are."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(key)}:{write(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(write, value)) + "]"
    return json.dumps(value)


# ---- netconfs


def _some(rng: random.Random, choices: dict[str, Any], chance: float = 0.2) -> dict[str, Any]:
    return {key: rng.choice(values) for key, values in choices.items() if rng.random() < chance}


_BRIDGE = {
    "bridge": ("cni0", "br1", "br2", "cni0"),
    "isGateway": (True, True, False),
    "isDefaultGateway": (True, True, False),
    "forceAddress": (True, False),
    "ipMasq": (True, False),
    "ipMasqBackend": ("nftables", "nftables", ""),
    "mtu": (1500, 1400, 1280, 0, 68),
    "hairpinMode": (True, False),
    "promiscMode": (True, False),
    "macspoofchk": (True, False),
    "portIsolation": (True, False),
    "disableContainerInterface": (False, False, True),
    "dns": ({}, {"nameservers": ["10.96.0.10"], "search": ["a.b"]}),
    "args": ({"cni": {"mac": _MACS[0]}}, {"cni": {"ips": ["10.1.2.77"]}}),
    "runtimeConfig": ({"mac": _MACS[0]}, {"ips": ["10.1.17.9"]}, {"ips": ["fd00:1:0:17::9/64"]}),
    "capabilities": ({"mac": True, "portMappings": True},),
}
_RARE = {"vlan": (5,), "vlanTrunk": ([{"id": 7}],), "enabledad": (True,), "ipMasqBackend": ("iptables",)}
_RANGE = {
    "rangeStart": ("10.1.2.20", "10.1.17.4"),
    "rangeEnd": ("10.1.2.40", "10.1.17.99"),
    "gateway": ("10.1.2.1", "10.1.2.9"),
}
_ROUTES: tuple[list[dict[str, Any]], ...] = (
    [],
    [{"dst": "0.0.0.0/0"}],
    [{"dst": "10.96.0.0/12", "gw": "10.1.2.1"}],
    [{"dst": "fd99::/16", "mtu": 1300}],
)


def _ipam(rng: random.Random) -> dict[str, Any]:
    ipam: dict[str, Any] = {"type": "host-local", "dataDir": f"{BASE}/networks"}
    first = {"subnet": "10.1.2.0/24", **_some(rng, _RANGE, 0.1)}
    six = {"subnet": "fd00:1:0:17::/64"}
    roll = rng.random()
    if roll < 0.3:
        ipam |= first
    else:
        ipam["ranges"] = [[first]] if roll < 0.6 else [[first], [six]] if roll < 0.85 else [[six]]
    return ipam | _some(rng, {"routes": _ROUTES, "resolvConf": (f"{BASE}/resolv.conf",)})


def _result(rng: random.Random, version: str) -> dict[str, Any]:
    """What an earlier plugin of the chain may have printed."""
    if version in VERSIONS[:2]:
        return {"cniVersion": version, "ip4": {"ip": "10.1.2.7/24", "gateway": "10.1.2.1"}, "dns": {}}
    ips: list[dict[str, Any]] = [{"address": "10.1.2.7/24", "gateway": "10.1.2.1", "interface": 1}]
    ips += [{"address": "fd00:1:0:17::7/64", "interface": 1}] if rng.random() < 0.3 else []
    for one in ips if version < "1" else ():
        one["version"] = "6" if ":" in one["address"] else "4"
    interfaces = [{"name": "vethx"}, {"name": "eth0", "mac": _MACS[0], "sandbox": PODS[0]}]
    return {"cniVersion": version, "interfaces": interfaces, "ips": ips, "routes": [{"dst": "0.0.0.0/0"}]}


def _portmap(rng: random.Random, version: str) -> dict[str, Any]:
    def mapping() -> dict[str, Any]:
        ports = {"hostPort": rng.choice((8080, 8081, 53)), "containerPort": rng.choice((80, 53))}
        return {
            **ports,
            "protocol": rng.choice(("tcp", "udp", "sctp")),
            **_some(rng, {"hostIP": ("10.0.0.1", "::1")}),
        }

    mappings = [mapping() for _ in range(rng.choice((0, 1, 1, 2, 5)))]
    found: dict[str, Any] = {"prevResult": _result(rng, version), "runtimeConfig": {"portMappings": mappings}}
    extra = {"snat": (True, False), "markMasqBit": (0, 13, 31), "masqAll": (True,), "backend": ("nftables",)}
    return found | _some(rng, extra) | _some(rng, {"conditionsV4": (["-s", "10.0.0.0/8"],)}, 0.03)


def netconf(rng: random.Random, plugin: str) -> dict[str, Any]:
    """One that is in order, or nearly so."""
    version = rng.choice(VERSIONS)
    conf: dict[str, Any] = {"cniVersion": version, "name": rng.choice(("cbr0", "net.2")), "type": plugin}
    if plugin == "flannel":
        conf |= {"subnetFile": f"{BASE}/subnet.env", "dataDir": f"{BASE}/flannel"}
        conf["delegate"] = _some(rng, _BRIDGE) | _some(rng, _RARE, 0.01)
        conf["ipam"] = {"dataDir": f"{BASE}/networks"} | _some(rng, {"routes": _ROUTES})
        conf |= _some(
            rng, {"delegateMode": ("auto", "builtin"), "runtimeConfig": _BRIDGE["runtimeConfig"]}, 0.1
        )
    elif plugin == "bridge":
        conf |= {"ipam": _ipam(rng), **_some(rng, _BRIDGE), **_some(rng, _RARE, 0.01)}
    elif plugin == "host-local":
        conf |= {
            "ipam": _ipam(rng),
            **_some(rng, {"args": _BRIDGE["args"], "runtimeConfig": _BRIDGE["runtimeConfig"]}),
        }
    elif plugin == "portmap":
        conf |= _portmap(rng, version)
    elif rng.random() < 0.3:
        conf["prevResult"] = _result(rng, version)
    if rng.random() < 0.05:
        conf["prevResult"] = _result(rng, rng.choice(VERSIONS))
    if rng.random() < 0.05:
        _delegate_elsewhere(rng, conf, plugin)
    return conf


def _delegate_elsewhere(rng: random.Random, conf: dict[str, Any], plugin: str) -> None:
    """Have a plugin executed whose answer is in a file."""
    if plugin == "flannel" and rng.random() < 0.5:
        conf["delegate"] = {"type": "fake"}
    elif plugin in ("flannel", "bridge"):
        conf.setdefault("ipam", {})["type"] = "fake"


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) below a value."""
    inner = (
        list(value.items())
        if isinstance(value, dict)
        else list(enumerate(value))
        if isinstance(value, list)
        else []
    )
    return [place for key, one in inner for place in ((value, key), *_places(one))]


def _mutate_once(rng: random.Random, conf: dict[str, Any]) -> None:
    places = _places(conf)
    if not places:
        return
    inside, key = rng.choice(places)
    roll = rng.random()
    if roll < 0.15:
        del inside[key]
    elif roll < 0.6:
        inside[key] = junk(rng)
    elif roll < 0.7 and isinstance(inside, dict):
        inside[_other_case(rng, key)] = rng.choice((deepcopy(inside[key]), junk(rng)))
    elif roll < 0.8 and isinstance(inside, dict):
        inside[rng.choice(("prevResult", "cni.dev/valid-attachments", "args", "vlan", text(rng)))] = junk(rng)
    elif roll < 0.9 and isinstance(inside[key], str):
        inside[key] = _mutate_text(rng, inside[key])
    elif isinstance(inside[key], list):
        inside[key] = inside[key] * 2
    else:
        inside[key] = [inside[key]]


def _other_case(rng: random.Random, key: str) -> str:
    return rng.choice(
        (key.upper(), key.lower(), key.swapcase(), key.replace("s", "\u017f"), key.replace("k", "\u212a"))
    )


def _mutate_text(rng: random.Random, old: str) -> str:
    at = rng.randrange(len(old) + 1)
    piece = rng.choice(("", "/", "..", "\0", "\ud800", ".", ":", " ", "0", "é", text(rng)))
    return old[:at] + piece + old[at + rng.randrange(3) :]


def _mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    kinds: tuple[Callable[[], bytes], ...] = (
        lambda: data[:at],
        lambda: data[:at] + rng.randbytes(rng.randrange(1, 4)) + data[at + 1 :],
        lambda: data + rng.choice((b"{}", b"\0", b"\n\n", b"x", b"]")),
        lambda: rng.choice((b"\xef\xbb\xbf", b"\0", b" ", b"[", b"\xff\xfe")) + data,
        lambda: data[:at] + data[max(0, at - 20) : at] + data[at:],
        lambda: rng.choice((b"", b"null", b"[]", b'""', b"{", b"1", b"{}", b"\xff")),
    )
    return rng.choice(kinds)()


def stdin_of(rng: random.Random, conf: dict[str, Any], mutations: int) -> bytes:
    """The netconf's bytes after that many mutations."""
    conf = deepcopy(conf)
    for _ in range(mutations):
        _mutate_once(rng, conf)
    data = write(conf).encode()
    return _mutate_bytes(rng, data) if mutations and rng.random() < 0.1 else data


# ---- environments

_IDS = (
    "",
    "c1\n",
    "-c1",
    "c/1",
    "é",
    "c" * 300,
    "c" * 5000,
    "..",
    "c1@eth0",
    "lock",
    "10.1.2.2",
    "last_reserved_ip.0",
)
_IFNAMES = (
    "",
    "lo",
    ".",
    "..",
    "a/b",
    "a:b",
    "a b",
    "e" * 15,
    "e" * 16,
    "é" * 7,
    "é" * 8,
    "eth0\n",
    "a\u00a0b",
    "%d",
)
_MORE_IFNAMES = (
    "eth%d",
    "all",
    "default",
    "-",
    "@",
    "\udcff",
    "eth0@x",
    "*",
    "a\u2028b",
    "日本語",
    "\x01",
    "'",
    '"',
)
_NETNS = (
    "",
    "/nonexistent",
    "/etc/passwd",
    f"{BASE}/plain",
    "/proc/self/ns/net",
    "/proc/thread-self/ns/net",
    "/run",
)
_MORE_NETNS = (
    "/run/netns/../netns/pod0",
    "run/netns/pod0",
    "/dev/null",
    "/" * 4000,
    "x" * 5000,
    "\udc80",
    f"{BASE}/loop",
)
_ARGS = (
    "",
    ";",
    "A=b",
    "IgnoreUnknown=1",
    "IgnoreUnknown=1;K8S_POD_NAME=x",
    "IP=10.1.2.50;IgnoreUnknown=true",
    "A=b=c",
)
_MORE_ARGS = (
    "IP=",
    "IP=zz;IgnoreUnknown=1",
    "MAC=0a:58:0a:01:11:05;IgnoreUnknown=1",
    "IgnoreUnknown=yes",
    "=",
    "é=\udcff",
    "MAC",
)
_COMMANDS = (
    "DEL",
    "CHECK",
    "STATUS",
    "GC",
    "VERSION",
    "",
    "add",
    "ADD\n",
    "NOPE",
    "CHECK",
    "DEL",
    "GC",
    "STATUS",
)
_MUTATIONS: dict[str, tuple[str, ...]] = {
    "CNI_CONTAINERID": _IDS,
    "CNI_IFNAME": _IFNAMES + _MORE_IFNAMES,
    "CNI_NETNS": _NETNS + _MORE_NETNS,
    "CNI_ARGS": _ARGS + _MORE_ARGS,
    "CNI_PATH": ("", "/nonexistent", ":", f"::{BASE}/bin", "\udcff", "/etc/passwd"),
    "CNI_NETNS_OVERRIDE": ("1", "TRUE", "0", "x"),
    "CNI_COMMAND": _COMMANDS,
}


def environment_of(rng: random.Random, mutations: int) -> dict[str, str]:
    """The variables of an ADD."""
    environment = {
        "CNI_COMMAND": "ADD",
        "CNI_CONTAINERID": rng.choice(("c1", "c2", "C.3_x-1")),
        "CNI_NETNS": rng.choice(PODS),
        "CNI_IFNAME": rng.choice(("eth0", "eth0", "net1")),
        "CNI_PATH": f"{BASE}/bin",
    }
    if rng.random() < 0.1:
        environment["CNI_ARGS"] = rng.choice(_ARGS)
    for _ in range(mutations):
        name = rng.choice(tuple(_MUTATIONS))
        if rng.random() < 0.15:
            environment.pop(name, None)
        else:
            environment[name] = rng.choice(_MUTATIONS[name])
    return environment


# ---- files


@dataclass(frozen=True)
class Change:
    """A file put in place before a call: `kind` is file, directory, link (content: target) or gone."""

    path: str
    kind: str
    content: bytes = b""


def subnet_env(rng: random.Random) -> bytes:
    """flanneld's file, sometimes damaged."""
    values = dict(_SUBNET_ENV)
    if rng.random() < 0.3:
        values |= _IPV6_ENV
    if rng.random() < 0.1:
        values["FLANNEL_IPMASQ"] = rng.choice(("false", "TRUE", ""))
    lines = [f"{key}={value}" for key, value in values.items()]
    for _ in range(rng.choice((0,) * 12 + (1, 1, 2))):
        at = rng.randrange(len(lines))
        key = lines[at].partition("=")[0]
        damaged = (
            lines[at][: rng.randrange(len(lines[at]) + 1)],
            f"{key}={text(rng)}",
            key,
            "",
            f"{key}=",
            f" {key}=1",
        )
        lines[at] = rng.choice((*damaged, f"{key}={rng.choice(_NUMBERS + _ADDRESSES)}"))
    return rng.choice(("\n", "\n", "\n", "\r\n")).join(lines).encode("utf-8", "surrogatepass") + b"\n"


_CONTENTS = (
    b"",
    b"c1",
    b"c1\r\neth0",
    b"c1\neth0",
    b"\xff\xfe",
    b"\r\n",
    b"c1\r\n",
    b"x" * 9000,
    b"\0\0",
    b" c2\r\nnet1\n",
)
_RESULTS = (
    b"",
    b"{}",
    b"null",
    b"[]",
    b'{"code":7,"msg":"no"}',
    b"\xff",
    b'{"cniVersion":"9.9.9"}',
    b'{"ips":3}',
    b"{",
)


def _state_changes(rng: random.Random) -> list[Change]:
    store, scratch = f"{BASE}/networks", f"{BASE}/flannel"
    network = f"{store}/{rng.choice(('cbr0', 'net.2'))}"
    owner = rng.choice(("c1", "c2"))
    saved = write(netconf(rng, "bridge")).encode()
    broken = rng.choice(
        (*_RESULTS, b'{"type":"bridge"}', b'{"type":7}', saved, saved[: len(saved) // 2], b"[" * 3000)
    )
    choices = (
        Change(f"{network}/10.1.{rng.choice((2, 17))}.{rng.randrange(1, 9)}", "file", rng.choice(_CONTENTS)),
        Change(f"{network}/10.1.{rng.choice((2, 17))}.{rng.randrange(1, 9)}", "directory"),
        Change(
            f"{network}/last_reserved_ip.{rng.randrange(2)}",
            rng.choice(("file", "directory")),
            text(rng).encode("utf-8", "replace"),
        ),
        Change(f"{network}/lock", rng.choice(("directory", "link")), b"/nonexistent/lock"),
        Change(
            f"{network}/{rng.choice(('sub/10.1.2.2', 'fd00:1:0:17::2', 'zz', 'FD00::1'))}",
            "file",
            rng.choice(_CONTENTS),
        ),
        Change(
            f"{network}/10.1.2.3", "link", rng.choice((b"10.1.2.3", b"/nonexistent", b"/etc/passwd", b".."))
        ),
        Change(network, "file", b"x"),
        Change(store, "file", b"x"),
        Change(
            f"{store}/.flannel-boot-cbr0",
            rng.choice(("file", "directory")),
            rng.choice((b"", b"x 1\n", b"\xff")),
        ),
        Change(scratch, "file", b"x"),
        Change(f"{scratch}/{owner}", rng.choice(("file", "file", "directory")), broken),
        Change(
            f"{scratch}/{owner}@{rng.choice(('eth0', 'net1'))}",
            rng.choice(("file", "file", "directory")),
            broken,
        ),
        Change(f"{BASE}/subnet.env", rng.choice(("gone", "directory")), b""),
        Change(
            f"{BASE}/resolv.conf",
            rng.choice(("file", "gone", "directory")),
            b"\xffnameserver\nnameserver 1\noptions a b\n",
        ),
    )
    return rng.sample(choices, rng.choice((1, 1, 2)))


_FOREIGN_STATE = (
    Change(f"{BASE}/networks/cbr0/10.1.2.2", "file", f"{FOREIGN}\r\neth0".encode()),
    Change(f"{BASE}/networks/cbr0/10.1.17.2", "file", f"{FOREIGN}\r\neth0".encode()),
    Change(f"{BASE}/flannel/{FOREIGN}", "file", b'{"type":"bridge","name":"cbr0"}'),
)


# ---- cases


@dataclass(frozen=True)
class Step:
    """One call. `chained`: with the last ADD's result as prevResult, as a runtime does."""

    plugin: str
    environment: dict[str, str]
    stdin: bytes
    chained: bool = False
    damage: tuple[Change, ...] = ()  # done before the call

    def command(self, name: str, **more: Any) -> Step:
        """The same input with another command."""
        return Step(self.plugin, {**self.environment, "CNI_COMMAND": name}, self.stdin, **more)


@dataclass(frozen=True)
class Case:
    """Calls in a row. `orderly`: what an ADD leaves has to be gone after the DEL with the same input."""

    fresh: bool
    changes: list[Change]
    steps: list[Step] = field(default_factory=list)
    orderly: bool = True


def case(seed: int, index: int) -> Case:
    """The case with that number."""
    rng = random.Random(f"{seed} {index}")
    plugin = rng.choice(PLUGINS)
    conf = netconf(rng, plugin)
    roll = rng.random()
    of_conf, of_environment = (
        (0, 0) if roll < 0.15 else (rng.choice((1, 1, 2, 3)), 0) if roll < 0.7 else (0, 1)
    )
    if roll > 0.9:
        of_conf, of_environment = 1, rng.choice((1, 2))
    add = Step(plugin, environment_of(rng, of_environment), stdin_of(rng, conf, of_conf))
    changes = [
        Change(f"{BASE}/subnet.env", "file", subnet_env(rng)),
        Change(f"{BASE}/answer", "file", _answer(rng)),
    ]
    orderly = True
    if rng.random() < 0.3:
        changes += _FOREIGN_STATE
    if rng.random() < 0.15:
        changes += _state_changes(rng)
        orderly = False
    fresh = rng.random() < 0.3 or not orderly
    # With another result than its own an attachment is not recognised, and left alone.
    orderly = orderly and not (plugin in ("flannel", "bridge") and b"prevresult" in add.stdin.lower())
    steps, quiet = _flow(rng, add, conf)
    return Case(fresh, changes, steps, orderly and quiet)


def _answer(rng: random.Random) -> bytes:
    """What the plugin `fake` prints."""
    if rng.random() < 0.3:
        return rng.choice(_RESULTS)
    return stdin_of(rng, _result(rng, rng.choice(VERSIONS)), rng.choice((0, 0, 1, 2)))


def _attachments(rng: random.Random, step: Step) -> Step:
    """GC with a list of what is to be kept."""
    pairs: Any = rng.choice(
        ([], [{"containerID": FOREIGN, "ifname": "eth0"}], [{"containerID": "c1", "ifname": "eth0"}])
    )
    if rng.random() < 0.4:
        pairs = junk(rng)
    added = b',"cni.dev/valid-attachments":' + write(pairs).encode() + b"}"
    return Step(step.plugin, {**step.environment, "CNI_COMMAND": "GC"}, step.stdin.rstrip(b"}") + added)


def _flow(rng: random.Random, add: Step, conf: dict[str, Any]) -> tuple[list[Step], bool]:
    """The calls of a case, and whether they are such that nothing may be left."""
    delete = add.command("DEL")
    roll = rng.random()
    if roll < 0.45:
        return [add, delete], True
    if roll < 0.55:
        gone = Step(add.plugin, {**delete.environment, "CNI_NETNS": ""}, add.stdin)
        return [add, add.command("CHECK", chained=True), add.command("DEL", chained=True), delete, gone], True
    if roll < 0.6:
        return [add, add, add.command("CHECK", chained=True), delete], True
    if roll < 0.65:
        other = Step(add.plugin, delete.environment, stdin_of(rng, conf, 2))
        return [add, other, delete], False
    if roll < 0.7:
        return [add, add.command("DEL", damage=tuple(_state_changes(rng))), delete], False
    if roll < 0.75:
        return [add, _attachments(rng, add), add.command("STATUS"), delete], False
    if roll < 0.8:
        mapped = stdin_of(
            rng, {**netconf(rng, "portmap"), "cniVersion": conf["cniVersion"]}, rng.choice((0, 0, 1))
        )
        port = Step("portmap", add.environment, mapped, chained=True)
        return [add, port, port.command("DEL", chained=True), delete], True
    command = rng.choice(_COMMANDS)
    return [_attachments(rng, add) if command == "GC" else add.command(command)], False


def insert_previous(stdin: bytes, result: bytes | None) -> bytes:
    """The netconf with that prevResult; unchanged if there is none, or it is no object."""
    body = stdin.rstrip()
    if not result or not body.startswith(b"{") or not body.endswith(b"}") or len(body) < 3:
        return stdin
    return body[:-1] + b',"prevResult":' + result + b"}"


def apply(change: Change) -> None:
    """Put a change in place as far as what is there lets it."""
    try:
        _clear(change.path)
        if change.kind == "gone":
            return
        os.makedirs(os.path.dirname(change.path), exist_ok=True)
        if change.kind == "directory":
            os.mkdir(change.path)
        elif change.kind == "link":
            os.symlink(change.content, change.path)
        else:
            with open(change.path, "wb") as file:
                file.write(change.content)
    except (NotADirectoryError, FileExistsError):
        return  # an earlier change made a file of one of its directories


def _clear(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        for name in os.listdir(path):
            _clear(f"{path}/{name}")
        os.rmdir(path)
    elif os.path.lexists(path):
        os.unlink(path)


clear = _clear
