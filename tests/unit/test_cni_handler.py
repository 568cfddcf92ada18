"""The protocol around the plugin: every refusal of the Go library's skel package, in its order."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import cni
from cni.errors import CniError, Declined
from cni.handler import handle
from cni.local import LocalHost
from cni.plugins.flannel import Flannel
from cni.spec import gojson
from cni.spec.request import Request
from cni.spec.version import SUPPORTED

ROOT = Path(__file__).parents[2]
GOOD = {
    "CNI_CONTAINERID": "c1",
    "CNI_NETNS": "/run/netns/no-such-namespace",
    "CNI_IFNAME": "eth0",
    "CNI_PATH": "/no/such/directory",
}
CONF = '{"cniVersion":"1.1.0","name":"cbr0","type":"flannel"}'
SUPPORTED_TEXT = " ".join(f'"{one}"' for one in SUPPORTED)


class Recorder:
    """A plugin that writes down what it is asked to do."""

    about = "CNI Plugin recorder"

    def __init__(self, own_netns: str = "") -> None:
        self.calls: list[str] = []
        self.netns = ""
        self._own_netns = own_netns

    def owns_netns(self, path: str) -> bool:
        return path == self._own_netns

    def add(self, request: Request) -> gojson.Object:
        self.calls.append("ADD")
        return {"cniVersion": request.version, "dns": {}}

    def delete(self, request: Request) -> None:
        self.calls.append(f"DEL {request.container_id}")
        self.netns = request.netns

    def check(self, request: Request) -> None:
        self.calls.append("CHECK")

    def status(self, request: Request) -> None:
        self.calls.append("STATUS")

    def gc(self, request: Request) -> None:
        self.calls.append("GC")


def environment(command: str, **changed: str | None) -> dict[str, str]:
    merged = {"CNI_COMMAND": command, **GOOD, **changed}
    return {name: value for name, value in merged.items() if value is not None}


def refusal(env: dict[str, str], stdin: str = CONF) -> tuple[int, str, str]:
    """Code, msg and details of the error; the plugin must not have been called."""
    plugin = Recorder()
    response = handle(Request(env, stdin.encode()), plugin)
    assert (response.exit_code, plugin.calls, response.stderr) == (1, [], "")
    error = json.loads(response.stdout)
    assert list(error) == ["code", "msg", "details"][: len(error)]
    return error["code"], error["msg"], error.get("details", "")


REQUIRED = {
    "ADD": ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"],
    "CHECK": ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"],
    "DEL": ["CNI_CONTAINERID", "CNI_IFNAME", "CNI_PATH"],
    "GC": ["CNI_PATH"],
    "STATUS": ["CNI_PATH"],
}


@pytest.mark.parametrize(
    ("command", "missing"), [(command, name) for command in REQUIRED for name in REQUIRED[command]]
)
@pytest.mark.parametrize("value", [None, ""])
def test_each_missing_variable_is_named(command: str, missing: str, value: str | None) -> None:
    expected = (4, f"required env variables [{missing}] missing", "")
    assert refusal(environment(command, **{missing: value}), stdin="garbage") == expected


@pytest.mark.parametrize("command", REQUIRED)
def test_all_missing_variables_are_named_in_order(command: str) -> None:
    expected = f"required env variables [{','.join(REQUIRED[command])}] missing"
    assert refusal({"CNI_COMMAND": command}) == (4, expected, "")


BAD_CHARACTERS = "interface name contains / or : or whitespace characters"


@pytest.mark.parametrize(
    ("changed", "msg", "details"),
    [
        ({"CNI_CONTAINERID": "a/b"}, "invalid characters in containerID", "a/b"),
        ({"CNI_CONTAINERID": "-a"}, "invalid characters in containerID", "-a"),
        ({"CNI_CONTAINERID": "a@eth0"}, "invalid characters in containerID", "a@eth0"),
        ({"CNI_CONTAINERID": "a\n"}, "invalid characters in containerID", "a\n"),
        ({"CNI_CONTAINERID": "\u00e9"}, "invalid characters in containerID", "\u00e9"),
        (
            {"CNI_IFNAME": "a" * 16},
            "interface name is too long",
            "interface name should be less than 16 characters",
        ),
        (
            {"CNI_IFNAME": "\u00e9" * 8},
            "interface name is too long",
            "interface name should be less than 16 characters",
        ),
        ({"CNI_IFNAME": "."}, "interface name is . or ..", ""),
        ({"CNI_IFNAME": ".."}, "interface name is . or ..", ""),
        ({"CNI_IFNAME": "a/b"}, BAD_CHARACTERS, ""),
        ({"CNI_IFNAME": "a:b"}, BAD_CHARACTERS, ""),
        ({"CNI_IFNAME": "a b"}, BAD_CHARACTERS, ""),
        ({"CNI_IFNAME": "a\u00a0b"}, BAD_CHARACTERS, ""),
        ({"CNI_IFNAME": "a\u0085"}, BAD_CHARACTERS, ""),
    ],
)
def test_a_bad_value_is_reported_before_missing_ones(changed: dict[str, str], msg: str, details: str) -> None:
    for command in ("ADD", "CHECK", "DEL"):
        assert refusal(environment(command, CNI_PATH=None, **changed), stdin="x") == (4, msg, details)


def test_the_container_id_is_checked_before_the_interface_name() -> None:
    env = environment("ADD", CNI_CONTAINERID="a/b", CNI_IFNAME="..")
    assert refusal(env)[1] == "invalid characters in containerID"


@pytest.mark.parametrize(
    "changed", [{"CNI_IFNAME": "a" * 15}, {"CNI_IFNAME": "a\x1cb"}, {"CNI_CONTAINERID": "0_.-" + "a" * 300}]
)
def test_what_go_takes_is_taken(changed: dict[str, str]) -> None:
    plugin = Recorder()
    assert handle(Request(environment("DEL", **changed), CONF.encode()), plugin).exit_code == 0
    assert plugin.calls == [f"DEL {changed.get('CNI_CONTAINERID', 'c1')}"]


@pytest.mark.parametrize("command", [*REQUIRED, "NOPE", "add"])
@pytest.mark.parametrize(
    ("stdin", "code", "msg", "details"),
    [
        ("", 6, "error unmarshall network config: unexpected end of JSON input", ""),
        ("{", 6, "error unmarshall network config: ", ""),
        ("[]", 6, "error unmarshall network config: expected a JSON object, found array", ""),
        (f"{CONF}x", 6, "error unmarshall network config: data after the top-level value: 'x'", ""),
        ('{"name":1}', 6, "error unmarshall network config: name must be a string, found number 1", ""),
        ("null", 7, "missing network name", ""),
        ('{"cniVersion":7}', 7, "missing network name", ""),
        ('{"name":""}', 7, "missing network name", ""),
        ('{"name":"a/b"}', 7, "invalid characters found in network name", "a/b"),
        ('{"name":"a","NAME":"../x"}', 7, "invalid characters found in network name", "../x"),
        ('{"name":"a\\n"}', 7, "invalid characters found in network name", "a\n"),
    ],
)
def test_the_network_name_comes_next_even_for_unknown_commands(
    command: str, stdin: str, code: int, msg: str, details: str
) -> None:
    found = refusal(environment(command), stdin)
    assert (found[0], found[2]) == (code, details)
    assert found[1].startswith(msg)


@pytest.mark.parametrize("command", ["NOPE", "add", " ADD", "UPDATE"])
def test_unknown_commands(command: str) -> None:
    assert refusal(environment(command), '{"name":"a","cniVersion":7}') == (
        4,
        f"unknown CNI_COMMAND: {command}",
        "",
    )


def conf(version: str) -> str:
    return f'{{"name":"cbr0","cniVersion":{version}}}'


@pytest.mark.parametrize("command", REQUIRED)
def test_the_version_must_be_a_string(command: str) -> None:
    code, msg, _ = refusal(environment(command), conf("1"))
    assert (code, msg) == (
        6,
        "decoding version from network config: cniVersion must be a string, found number 1",
    )


@pytest.mark.parametrize("command", ["ADD", "DEL"])
@pytest.mark.parametrize("version", ["2.0.0", "1.0", "1.0.00", "1.2.0", "x", "0.2"])
def test_add_and_del_need_exactly_a_supported_version(command: str, version: str) -> None:
    details = f'config is "{version}", plugin supports [{SUPPORTED_TEXT}]'
    assert refusal(environment(command), conf(f'"{version}"')) == (1, "incompatible CNI versions", details)


OLDER = [("CHECK", version) for version in SUPPORTED[:4]]
OLDER += [(command, version) for command in ("GC", "STATUS") for version in SUPPORTED[:6]]


@pytest.mark.parametrize(("command", "version"), [*OLDER, ("CHECK", ""), ("GC", "1"), ("STATUS", "0.9")])
def test_newer_commands_need_a_newer_netconf(command: str, version: str) -> None:
    expected = (1, f"config version does not allow {command}", "")
    assert refusal(environment(command), conf(f'"{version}"')) == expected


@pytest.mark.parametrize("command", ["CHECK", "GC", "STATUS"])
def test_newer_commands_and_netconfs_from_the_future(command: str) -> None:
    expected = (1, f"plugin version does not allow {command}", "")
    assert refusal(environment(command), conf('"1.1.1"')) == expected
    assert refusal(environment(command), conf('"2"')) == expected
    assert refusal(environment(command), conf('"1.1"'))[1] == "incompatible CNI versions"


@pytest.mark.parametrize("command", ["CHECK", "GC", "STATUS"])
@pytest.mark.parametrize(
    ("version", "msg"),
    [
        ("1.0.0.0", 'invalid version "1.0.0.0": too many parts'),
        ("one", 'failed to convert major version part "one": invalid syntax'),
        ("1.x", 'failed to convert minor version part "x": invalid syntax'),
        ("1.0.", 'failed to convert micro version part "": invalid syntax'),
    ],
)
def test_what_is_no_version_cannot_be_compared(command: str, version: str, msg: str) -> None:
    assert refusal(environment(command), conf(f'"{version}"')) == (6, msg, "")


def test_the_plugins_own_namespace_is_refused_before_anything_happens() -> None:
    plugin = Recorder(own_netns="/own")
    response = handle(Request(environment("ADD", CNI_NETNS="/own"), CONF.encode()), plugin)
    assert json.loads(response.stdout) == {
        "code": 8,
        "msg": "plugin's netns and netns from CNI_NETNS should not be the same",
    }
    assert (response.exit_code, plugin.calls) == (1, [])


def test_del_with_the_plugins_own_namespace_is_that_of_a_container_without_one() -> None:
    """A process of the host has got the number of the container's: what the container held is released."""
    plugin = Recorder(own_netns="/own")
    response = handle(Request(environment("DEL", CNI_NETNS="/own"), CONF.encode()), plugin)
    assert (response.exit_code, response.stdout) == (0, b"")
    assert (plugin.calls, plugin.netns) == (["DEL c1"], "")


@pytest.mark.parametrize(
    ("override", "code"), [("1", 0), ("true", 0), ("True", 0), ("TRUE", 0), ("yes", 1), ("0", 1), ("", 1)]
)
def test_the_override_is_1_or_true(override: str, code: int) -> None:
    env = environment("ADD", CNI_NETNS="/own", CNI_NETNS_OVERRIDE=override)
    assert handle(Request(env, CONF.encode()), Recorder(own_netns="/own")).exit_code == code


def test_check_is_not_asked_about_the_namespace() -> None:
    env = environment("CHECK", CNI_NETNS="/own")
    assert handle(Request(env, CONF.encode()), Recorder(own_netns="/own")).exit_code == 0


def test_flannel_knows_its_own_namespace(tmp_path: Path) -> None:
    flannel = Flannel(LocalHost(print, {}))
    assert flannel.owns_netns("/proc/self/ns/net")
    assert not flannel.owns_netns("/proc/self/ns/mnt")
    assert not flannel.owns_netns(f"{tmp_path}/absent")


@pytest.mark.parametrize("command", REQUIRED)
def test_a_command_that_succeeds_prints_nothing_but_a_result(command: str) -> None:
    plugin = Recorder()
    response = handle(Request(environment(command), CONF.encode()), plugin)
    expected = b'{\n    "cniVersion": "1.1.0",\n    "dns": {}\n}' if command == "ADD" else b""
    assert (response.exit_code, response.stdout, response.stderr) == (0, expected, "")
    assert plugin.calls == ["DEL c1" if command == "DEL" else command]


@pytest.mark.parametrize("command", ["ADD", "DEL"])
@pytest.mark.parametrize("version", ["", *SUPPORTED])
def test_every_supported_version_is_served(command: str, version: str) -> None:
    plugin = Recorder()
    assert handle(Request(environment(command), conf(f'"{version}"').encode()), plugin).exit_code == 0
    assert plugin.calls


def test_errors_are_printed_as_the_go_plugins_do() -> None:
    class Failing(Recorder):
        def delete(self, request: Request) -> None:
            raise CniError(11, "later <b>", "why")

    response = handle(Request(environment("DEL"), CONF.encode()), Failing())
    text = '{\n    "code": 11,\n    "msg": "later \\u003cb\\u003e",\n    "details": "why"\n}'
    assert response.stdout.decode() == text


def test_our_own_bugs_are_999_with_a_traceback_on_stderr() -> None:
    class Broken(Recorder):
        def add(self, request: Request) -> gojson.Object:
            raise KeyError("bug")

    response = handle(Request(environment("ADD"), CONF.encode()), Broken())
    assert (response.exit_code, json.loads(response.stdout)) == (
        1,
        {"code": 999, "msg": "flannel: internal error: KeyError: 'bug'"},
    )
    assert "Traceback" in response.stderr and 'raise KeyError("bug")' in response.stderr


def run(
    env: dict[str, str], stdin: int | None = None, text: bytes = b""
) -> subprocess.CompletedProcess[bytes]:
    """The executable itself, in an environment as bare as a runtime's."""
    return subprocess.run(
        [sys.executable, "-m", "cni"],
        check=False,
        env=env,
        input=text if stdin is None else None,
        stdin=stdin,
        capture_output=True,
        cwd=ROOT,
        timeout=30,
    )


class TestExecutable:
    def test_version_does_not_read_stdin(self) -> None:
        reader, writer = os.pipe()  # never closed before the answer: a read would wait for ever
        try:
            done = run({"CNI_COMMAND": "VERSION"}, stdin=reader)
        finally:
            os.close(reader)
            os.close(writer)
        assert (done.returncode, done.stderr) == (0, b"")
        assert done.stdout == (
            b'{"cniVersion":"1.1.0","supportedVersions":'
            b'["0.1.0","0.2.0","0.3.0","0.3.1","0.4.0","1.0.0","1.1.0"]}\n'
        )

    @pytest.mark.parametrize("env", [{}, {"CNI_COMMAND": ""}])
    def test_without_a_command_it_tells_what_it_is(self, env: dict[str, str]) -> None:
        done = run(env)
        assert (done.returncode, done.stdout) == (0, b"")
        assert done.stderr.decode().splitlines() == [
            f"CNI Plugin flannel version {cni.__version__} (linux/amd64)",
            f"CNI protocol versions supported: {', '.join(SUPPORTED)}",
        ]

    def test_bad_variables_are_reported_before_stdin_is_read(self) -> None:
        reader, writer = os.pipe()
        try:
            done = run({"CNI_COMMAND": "ADD"}, stdin=reader)
        finally:
            os.close(reader)
            os.close(writer)
        assert done.returncode == 1
        assert json.loads(done.stdout)["msg"].endswith("CNI_NETNS,CNI_IFNAME,CNI_PATH] missing")

    def test_unreadable_stdin_is_an_io_failure(self) -> None:
        with open(os.devnull, "wb") as only_writable:
            done = run(environment("DEL"), stdin=only_writable.fileno())
        assert done.returncode == 1
        assert json.loads(done.stdout) == {"code": 5, "msg": "error reading from stdin: bad file descriptor"}

    def test_stdin_is_bounded(self) -> None:
        with open("/dev/zero", "rb") as endless:
            done = run(environment("DEL"), stdin=endless.fileno())
        assert json.loads(done.stdout) == {
            "code": 5,
            "msg": "error reading from stdin: more than 16777216 bytes",
        }

    def test_failures_of_the_plugin_reach_stdout_and_the_exit_status(self, tmp_path: Path) -> None:
        config = {"name": "cbr0", "cniVersion": "1.1.0", "subnetFile": f"{tmp_path}/absent"}
        done = run(environment("STATUS"), text=json.dumps(config).encode())
        assert (done.returncode, json.loads(done.stdout)["code"], done.stderr) == (1, 50, b"")


def test_the_version_is_that_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert cni.__version__ == project["version"]


def test_no_heavy_module_is_imported() -> None:
    """Each of these would cost a pod's start 2 to 30 ms."""
    heavy = (
        "dataclasses typing ipaddress enum re json socket logging argparse tempfile shutil subprocess inspect"
    )
    code = f"import sys, cni.__main__; print(*set({heavy.split()!r}) & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}"],
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    assert done.stdout.strip() == ""


class Decliner(Recorder):
    """A plugin in a daemon that cannot do what it is asked."""

    def delete(self, request: Request) -> None:
        raise Declined(f"not {request.container_id} here")


def test_what_a_daemon_declines_is_no_failure() -> None:
    environment = {**GOOD, "CNI_COMMAND": "DEL"}
    with pytest.raises(Declined, match="not c1 here"):
        handle(Request(environment, CONF.encode()), Decliner())
