"""Removal of iptables' chains of a container, whichever `iptables` has made them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cni.errors import CniError
from cni.plugins import xtables
from tests.netns.firewall_fixtures import recorded_programs
from tests.netns.nft_fixtures import Wired, wired

# As upstream's portmap makes them for a container, beside those of another one.
RULES = """\
*nat
:CNI-HOSTPORT-DNAT - [0:0]
:CNI-DN-mine - [0:0]
:CNI-DN-mine2 - [0:0]
:CNI-DN-other - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT
-A CNI-HOSTPORT-DNAT -p tcp -m comment --comment "dnat -j CNI-DN-mine" -m tcp --dport 81 -j CNI-DN-other
-A CNI-HOSTPORT-DNAT -p tcp -m comment --comment "dnat name: \\"n\\"" -m multiport --dports 80 -j CNI-DN-mine
-A CNI-HOSTPORT-DNAT -p udp -m multiport --dports 8080 -g CNI-DN-mine
-A CNI-DN-mine -p tcp -m tcp --dport 8080 -j CNI-DN-mine2
-A CNI-DN-mine2 -p tcp -m tcp --dport 8080 -j RETURN
-A CNI-DN-other -p tcp -m tcp --dport 8081 -j RETURN
COMMIT
"""
MINE = ["CNI-DN-mine", "CNI-DN-mine2"]
PARENTS = ["CNI-HOSTPORT-DNAT"]


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Wired]:
    with wired(tmp_path) as made:
        yield made


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The log of the legacy programs that were started; they use a lock of their own."""
    directory = tmp_path / "bin"
    directory.mkdir()
    names = [f"{ip}tables-legacy{what}" for ip in ("ip", "ip6") for what in ("", "-restore", "-save")]
    log = recorded_programs(directory, dict.fromkeys(names, "xtables-legacy-multi"))
    monkeypatch.setenv("PATH", f"{directory}:/usr/sbin:/usr/bin:/sbin:/bin")
    monkeypatch.setenv("XTABLES_LOCKFILE", str(tmp_path / "xtables.lock"))
    return log


def load(lab: Wired, program: str) -> None:
    done = lab.node.run([f"{program}-restore", "--noflush"], {}, RULES)
    assert done.returncode == 0, done.stderr


def listed(lab: Wired, program: str) -> list[str]:
    lines = lab.node.output([program, "-t", "nat", "-S"], {}, "").splitlines()
    return [line for line in lines if not line.startswith("-P")]


def remove(lab: Wired) -> bool:
    return lab.on(lambda host: xtables.remove_chains(host, "nat", MINE, PARENTS))


@pytest.mark.parametrize("ip", ["ip", "ip6"])
@pytest.mark.parametrize("kind", ["nft", "legacy"])
def test_the_containers_chains_and_the_rules_that_lead_to_them(
    lab: Wired, started: Path, ip: str, kind: str
) -> None:
    program = f"{ip}tables-{kind}"
    load(lab, program)
    before = listed(lab, program)
    wanted = [line for line in before if "mine" not in line.replace('"dnat -j CNI-DN-mine"', "")]
    assert len(before) - len(wanted) == 6, before
    assert remove(lab)
    assert listed(lab, program) == wanted
    assert not remove(lab)
    assert listed(lab, program) == wanted


def test_all_four_places_at_once(lab: Wired, started: Path) -> None:
    programs = [f"{ip}tables-{kind}" for ip in ("ip", "ip6") for kind in ("nft", "legacy")]
    for program in programs:
        load(lab, program)
    assert remove(lab)
    for program in programs:
        assert "-N CNI-DN-mine" not in listed(lab, program)
        assert "-N CNI-DN-other" in listed(lab, program)


def test_a_legacy_table_without_the_chains_starts_no_program(lab: Wired, started: Path) -> None:
    load(lab, "iptables-legacy")
    assert remove(lab)
    started.write_text("")
    assert not remove(lab)
    assert started.read_text() == ""


def test_nothing_is_made_where_nothing_was(lab: Wired) -> None:
    assert not remove(lab)
    assert lab.ruleset() == ""
    tables = lab.node.output(["cat", "/proc/net/ip_tables_names"], {}, "")
    assert "nat" not in tables.split()


def test_a_program_that_fails_says_why(lab: Wired) -> None:
    payload = "*nat\n-A NOPE -j ACCEPT\nCOMMIT\n"
    with pytest.raises(CniError, match=r"iptables-restore --noflush --wait=10: exit \d: .*[Ll]ine"):
        lab.on(lambda host: xtables.restore(4, payload))


def test_chains_that_no_program_can_delete_are_noted(
    lab: Wired, started: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(lab, "ip6tables-legacy")
    monkeypatch.setattr("cni.plugins.xtables._find", {"ip6tables": "/usr/sbin/ip6tables"}.get)
    remove(lab)
    assert "-N CNI-DN-mine" in listed(lab, "ip6tables-legacy")
    assert lab.notes == ["CNI-DN-mine stays in the legacy table nat: no ip6tables-legacy to delete it with"]
