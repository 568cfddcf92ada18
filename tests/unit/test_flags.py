"""Flags and variables against Go's `flag` package: its syntax, its traps, upstream's defaults."""

import re
from dataclasses import fields

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cni.errors import ConfigError
from flanneld.flags import (
    FlagError,
    HelpAsked,
    Options,
    Parsed,
    Store,
    VersionAsked,
    check_ranges,
    parse,
    usage,
)


def options(*argv: str, **environ: str) -> Options:
    parsed = parse(argv, environ)
    assert parsed.warnings == ()
    return parsed.options


# Upstream's command line, with the text that sets each flag and the value that must result.
UPSTREAM = [
    ("etcd-endpoints", ("http://127.0.0.1:4001", "http://127.0.0.1:2379"), "a, b,", ("a", " b", "")),
    ("etcd-prefix", "/coreos.com/network", "/p", "/p"),
    ("etcd-keyfile", "", "k", "k"),
    ("etcd-certfile", "", "c", "c"),
    ("etcd-cafile", "", "a", "a"),
    ("etcd-username", "", "u", "u"),
    ("etcd-password", "", "p", "p"),
    ("iface", (), "eth0,eth1", ("eth0,eth1",)),
    ("iface-regex", (), "^eth", ("^eth",)),
    ("iface-can-reach", "", "192.0.2.1", "192.0.2.1"),
    ("subnet-file", "/run/flannel/subnet.env", "/f", "/f"),
    ("public-ip", "", "192.0.2.2", "192.0.2.2"),
    ("public-ipv6", "", "2001:db8::1", "2001:db8::1"),
    ("subnet-lease-renew-margin", 60, "0x10", 16),
    ("ip-masq", False, "T", True),
    ("ip-masq-fully-random-disable", False, "1", True),
    ("kube-subnet-mgr", False, "true", True),
    ("kube-api-url", "", "https://api", "https://api"),
    ("kube-annotation-prefix", "flannel.alpha.coreos.com", "x.y", "x.y"),
    ("kubeconfig-file", "", "/k", "/k"),
    ("healthz-ip", "0.0.0.0", "::1", "::1"),
    ("healthz-port", 0, "8081", 8081),
    ("iptables-resync", 5, "-3", -3),
    ("iptables-forward-rules", True, "F", False),
    ("ip-blackhole-route", False, "True", True),
    ("net-config-path", "/etc/kube-flannel/net-conf.json", "/n", "/n"),
    ("set-node-network-unavailable", True, "FALSE", False),
    ("v", 0, "4", 4),
    ("vmodule", (), "etcd=2,,re*=4,x=0", (("etcd", 2), ("re*", 4))),
    ("log_backtrace_at", "", "daemon.py:05", "daemon.py:5"),
    ("lease-db", "", "/l", "/l"),
    ("state-dir", "/var/lib/flannel", "/s", "/s"),
    ("cni-socket", "/run/flannel/cni.sock", "/c", "/c"),
]
BY_NAME = pytest.mark.parametrize(
    ("name", "default", "text", "value"), UPSTREAM, ids=[row[0] for row in UPSTREAM]
)


@BY_NAME
def test_default_flag_and_variable(name: str, default: object, text: str, value: object) -> None:
    attribute = name.replace("-", "_")
    assert getattr(options(), attribute) == default
    assert getattr(options(f"--{name}={text}"), attribute) == value
    assert getattr(options(f"-{name}={text}"), attribute) == value
    variable = "FLANNELD_" + name.upper().replace("-", "_")
    assert getattr(options(**{variable: text}), attribute) == value
    assert getattr(options(**{variable: ""}), attribute) == default


def test_every_option_is_in_the_table_above() -> None:
    named = {name.replace("-", "_") for name, *_ in UPSTREAM}
    assert {f.name for f in fields(Options)} == named | {"version", "etcd_asked"}


@BY_NAME
def test_value_as_the_next_word(name: str, default: object, text: str, value: object) -> None:
    if isinstance(default, bool):
        # The trap: the word after a bool ends the flags.
        after = options(f"--{name}", text, "--iface=never")
        assert getattr(after, name.replace("-", "_")) is True
        assert after.iface == ()
    else:
        after = options(f"--{name}", text, "--ip-masq=1")
        assert getattr(after, name.replace("-", "_")) == value
        assert after.ip_masq


def test_value_may_look_like_a_flag_or_be_empty() -> None:
    assert options("--public-ip", "--ip-masq").public_ip == "--ip-masq"
    assert options("--etcd-prefix=", "--ip-masq").etcd_prefix == ""
    assert options("--etcd-prefix=a=b").etcd_prefix == "a=b"


@pytest.mark.parametrize("end", ["--", "-", "", "word"])
def test_flags_end_at_the_first_word_that_is_none(end: str) -> None:
    result = options("-v=1", end, "--no-such-flag", "-v=2")
    assert result.v == 1


def test_last_wins_and_lists_append() -> None:
    result = options("--iface=a", "-iface", "b", "-public-ip=1", "--iface=c", "-public-ip=2")
    assert result.iface == ("a", "b", "c")
    assert result.public_ip == "2"
    # Not a list flag although its value is one, as in klog.
    assert options("--vmodule=a=1,b=2", "--vmodule=c=3").vmodule == (("c", 3),)


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--etcd-endpoint=x"], "flag provided but not defined: -etcd-endpoint"),
        (["--blackhole-route"], "flag provided but not defined: -blackhole-route"),
        (["--log-backtrace-at=a"], "flag provided but not defined: -log-backtrace-at"),
        (["--IP-MASQ"], "flag provided but not defined: -IP-MASQ"),
        (["--a\nb=1"], 'flag provided but not defined: -"a\\nb"'),
        (["---v=1"], "bad flag syntax: ---v=1"),
        (["--=1"], "bad flag syntax: --=1"),
        (["-=1"], "bad flag syntax: -=1"),
        (["-v=1", "--iface"], "flag needs an argument: -iface"),
        (["--ip-masq=yes"], 'invalid boolean value "yes" for -ip-masq: parse error'),
        (["--ip-masq="], 'invalid boolean value "" for -ip-masq: parse error'),
        (["--healthz-port", "x"], 'invalid value "x" for flag -healthz-port: parse error'),
        (
            ["--healthz-port=9223372036854775808"],
            'invalid value "9223372036854775808" for flag -healthz-port: value out of range',
        ),
        *(
            (
                [f"--vmodule={text}"],
                f'invalid value "{text}" for flag -vmodule: '
                "syntax error: expect comma-separated list of filename=N",
            )
            for text in ("x", "=1", "x=", "x=1=2", "x=y", "a=1,b")
        ),
        (
            ["--vmodule=x=-1"],
            'invalid value "x=-1" for flag -vmodule: negative value for vmodule level',
        ),
        *(
            (
                [f"--log_backtrace_at={text}"],
                f'invalid value "{text}" for flag -log_backtrace_at: syntax error: expect file.go:234',
            )
            for text in ("x", "x.py", "x:1", "x.py:", ":1", "x.py:1:2", "x.py:y")
        ),
        (
            ["--log_backtrace_at=x.py:-1"],
            'invalid value "x.py:-1" for flag -log_backtrace_at: negative value for line',
        ),
        (["--version", "--bad"], "flag provided but not defined: -bad"),
        (["--bad", "--help"], "flag provided but not defined: -bad"),
    ],
)
def test_parse_errors_read_as_in_go(argv: list[str], text: str) -> None:
    with pytest.raises(FlagError) as caught:
        parse(argv, {})
    assert str(caught.value) == text


@pytest.mark.parametrize("word", ["-h", "--h", "-help", "--help", "--help=false", "-h=1"])
def test_help(word: str) -> None:
    with pytest.raises(HelpAsked):
        parse(["--ip-masq", word, "--bad"], {})


def test_version() -> None:
    for argv in (["--version"], ["-version=t", "--iface", "x"], ["--version", "rest"]):
        with pytest.raises(VersionAsked):
            parse(argv, {"FLANNELD_HEALTHZ_PORT": "not read"})
    assert not options("--version=false").version
    assert not options(FLANNELD_VERSION="true").version
    assert not options(FLANNELD_VERSION="maybe").version


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("-0", 0),
        ("+7", 7),
        ("007", 7),
        ("010", 8),
        ("0_7", 7),
        ("0o17", 15),
        ("0O1_7", 15),
        ("0b101", 5),
        ("0B_1", 1),
        ("0x_fF", 255),
        ("-0X10", -16),
        ("1_000_000", 1000000),
        ("9223372036854775807", 2**63 - 1),
        ("-9223372036854775808", -(2**63)),
    ],
)
def test_go_integers(text: str, value: int) -> None:
    assert options(f"--healthz-port={text}").healthz_port == value


@pytest.mark.parametrize(
    "text",
    [
        *("", " 1", "1 ", "1\n", "08", "0x", "0b2", "0o8", "_1", "1_", "1__0", "0x1_", "0x__1", "+-1", "1.0"),
        *("1e3", "١", "-", "0_", "-9223372036854775809", "9" * 5000, "0x" + "f" * 17),
    ],
)
def test_not_go_integers(text: str) -> None:
    with pytest.raises(FlagError):
        parse([f"--healthz-port={text}"], {})


def test_no_place_for_a_backtrace() -> None:
    assert options("--log_backtrace_at=").log_backtrace_at == ""
    assert options("--log_backtrace_at=x.py:0").log_backtrace_at == ""


def test_v_is_plain_decimal_of_32_bits() -> None:
    assert options("-v=010").v == 10
    assert options("-v", "-1").v == -1
    assert options("-v=2147483647").v == 2**31 - 1
    for text in ("0x10", "1_0", "2147483648", "", "9" * 5000):
        with pytest.raises(FlagError):
            parse([f"-v={text}"], {})


@given(
    number=st.integers(-(2**63), 2**63 - 1),
    style=st.sampled_from(["d", "#x", "#X", "#b", "#o", "_d", "#_x", "#_b", "#_o"]),
)
def test_integers_in_every_notation(number: int, style: str) -> None:
    assert options(f"--healthz-port={number:{style}}").healthz_port == number


@given(st.text("0123456789abfoxBX_+- ", max_size=8))
@example("0o7_7")
def test_integers_agree_with_python_literals(text: str) -> None:
    """Python's literals are Go's, but for spaces around them and a leading zero (octal in Go)."""
    try:
        expected: int | None = int(text, 0)
    except ValueError:
        expected = None
    leading_zero = re.fullmatch(r"[+-]?0[0-9_]*[1-7][0-9_]*", text)
    if leading_zero:
        try:
            expected = int(text, 8)
        except ValueError:
            expected = None
    if " " in text:
        expected = None
    try:
        found: int | None = options(f"--healthz-port={text}").healthz_port
    except FlagError:
        found = None
    assert found == expected


WORDS = st.one_of(
    st.text(max_size=8),
    st.builds(
        lambda dash, name, rest: dash + name + rest,
        st.sampled_from(["-", "--", "---"]),
        st.sampled_from([row[0] for row in UPSTREAM]),
        st.sampled_from(["", "=", "=1", "=x", "=true"]),
    ),
)


@given(
    argv=st.lists(WORDS, max_size=6),
    environ=st.dictionaries(
        st.sampled_from(["FLANNELD_" + row[0].upper().replace("-", "_") for row in UPSTREAM]),
        st.text(max_size=5),
    ),
)
def test_nothing_else_is_raised(argv: list[str], environ: dict[str, str]) -> None:
    lines: list[str] = []
    try:
        parsed = parse(argv, environ)
    except (FlagError, HelpAsked) as exc:
        lines = [str(exc)]
    else:
        lines = [*parsed.warnings, parsed.options.redacted()]
        assert isinstance(parsed.options.healthz_port, int)
    assert all("\n" not in line for line in lines)


# --- variables --------------------------------------------------------------------------------------


def test_argv_wins_even_with_the_default() -> None:
    result = options(
        "--ip-masq=false",
        "--healthz-port=0",
        "--iface=a",
        FLANNELD_IP_MASQ="true",
        FLANNELD_HEALTHZ_PORT="1",
        FLANNELD_IFACE="b",
    )
    assert (result.ip_masq, result.healthz_port, result.iface) == (False, 0, ("a",))


def test_bad_variables_are_told_and_the_rest_is_applied() -> None:
    parsed = parse(
        [],
        {
            "FLANNELD_HEALTHZ_PORT": "http",
            "FLANNELD_IPTABLES_FORWARD_RULES": "yes",
            "FLANNELD_SUBNET_LEASE_RENEW_MARGIN": "9" * 30,
            "FLANNELD_PUBLIC_IP": "192.0.2.1",
            "FLANNELD_V": "2",
            "FLANNELD_VMODULE": "etcd",
        },
    )
    assert parsed.options == Options(public_ip="192.0.2.1", v=2)
    assert len(parsed.warnings) == 4
    assert any("pattern=N; --vmodule stays unset" in line for line in parsed.warnings)
    told = {line.split()[0]: line for line in parsed.warnings}
    assert '"http"' in told["FLANNELD_HEALTHZ_PORT"]
    assert "--healthz-port stays 0" in told["FLANNELD_HEALTHZ_PORT"]
    assert "true or false" in told["FLANNELD_IPTABLES_FORWARD_RULES"]
    assert "value out of range" in told["FLANNELD_SUBNET_LEASE_RENEW_MARGIN"]


def test_variables_that_name_no_flag_are_ignored() -> None:
    environ = {"FLANNELD_NO_SUCH": "1", "FLANNELD_": "1", "FLANNELD_IP-MASQ": "1", "FLANNEL_IP_MASQ": "1"}
    assert parse([], {**environ, "flanneld_ip_masq": "1", "IP_MASQ": "1"}) == Parsed(Options(), ())


def test_a_list_from_the_environment_is_one_item() -> None:
    result = options(FLANNELD_IFACE="eth0,eth1", FLANNELD_IFACE_REGEX="^a,b$")
    assert (result.iface, result.iface_regex) == (("eth0,eth1",), ("^a,b$",))


# --- what follows from the options ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "environ", "store"),
    [
        ([], {}, Store.SQLITE),
        (["--etcd-prefix=/x", "--etcd-username=u"], {}, Store.SQLITE),
        (["--etcd-endpoints=http://127.0.0.1:4001,http://127.0.0.1:2379"], {}, Store.ETCD),
        (["-etcd-endpoints", ""], {}, Store.ETCD),
        ([], {"FLANNELD_ETCD_ENDPOINTS": "http://e:2379"}, Store.ETCD),
        ([], {"FLANNELD_ETCD_ENDPOINTS": ""}, Store.SQLITE),
        (["--kube-subnet-mgr", "--etcd-endpoints=x"], {}, Store.KUBERNETES),
        ([], {"FLANNELD_KUBE_SUBNET_MGR": "1"}, Store.KUBERNETES),
    ],
)
def test_store(argv: list[str], environ: dict[str, str], store: Store) -> None:
    assert options(*argv, **environ).store is store


def test_lease_database() -> None:
    assert options().lease_db_path == "/var/lib/flannel/leases.db"
    assert options("--state-dir=/s/").lease_db_path == "/s/leases.db"
    assert options("--state-dir=/s", "--lease-db=/l").lease_db_path == "/l"


@pytest.mark.parametrize(("margin", "good"), [("0", False), ("1", True), ("1439", True), ("1440", False)])
def test_renew_margin(margin: str, good: bool) -> None:
    result = options(f"--subnet-lease-renew-margin={margin}")
    if good:
        check_ranges(result)
    else:
        with pytest.raises(ConfigError, match=rf"--subnet-lease-renew-margin is {margin}: .* 1 to 1439"):
            check_ranges(result)


@pytest.mark.parametrize(
    "argv",
    [
        ["--etcd-password=s3cret"],
        ["--etcd-endpoints=http://a:2379,https://user:s3cret@b:2379"],
        ["--etcd-endpoints=user:s3cret@b:2379"],
        ["--etcd-endpoints=https://user:x@s3cret@b:2379"],
        ["--kube-api-url=https://user:s3cret@api:6443/path"],
    ],
)
def test_no_password_in_the_log(argv: list[str]) -> None:
    line = options(*argv).redacted()
    assert "s3cret" not in line
    assert "***" in line


def test_the_log_line_keeps_the_rest() -> None:
    line = options("--etcd-endpoints=http://a:2379,http://[::1]:2379", "--etcd-prefix=/a b").redacted()
    assert 'etcd-endpoints=["http://a:2379", "http://[::1]:2379"]' in line
    assert 'etcd-prefix="/a b"' in line
    assert 'etcd-password=""' in line
    assert "ip-masq=false" in line


def test_usage_lists_flags_as_go_does() -> None:
    lines = usage("/opt/bin/flanneld").split("\n")
    assert lines[0] == "Usage: /opt/bin/flanneld [OPTION]..."
    heads = lines[1:-1:2]
    assert heads == sorted(heads)
    names = [head.split()[0].removeprefix("-") for head in heads]
    assert sorted(names) == sorted([row[0] for row in UPSTREAM] + ["version"])
    after = dict(zip(heads, lines[2::2], strict=True))
    assert after["  -etcd-prefix string"].endswith(' (default "/coreos.com/network")')
    assert after["  -subnet-lease-renew-margin int"].endswith(" (default 60)")
    assert after["  -iptables-forward-rules"].endswith(" (default true)")
    assert "default" not in after["  -ip-masq"] + after["  -v value"] + after["  -iface value"]
    assert all(text.startswith("    \t") for text in after.values())
