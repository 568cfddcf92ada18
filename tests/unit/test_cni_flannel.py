"""What flannel does around its delegate, with small scripts as delegates that fail in every way."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cni.handler import handle
from cni.local import LocalHost
from cni.plugins.flannel import Flannel
from cni.spec.request import Request

SUBNET_ENV = (
    "FLANNEL_NETWORK=10.1.0.0/16\nFLANNEL_SUBNET=10.1.17.1/24\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=true\n"
)
RESULT = '{"cniVersion":"VERSION","ips":[{"address":"10.1.17.2/24"}]}'
VERSION_ERROR = '{"code":1,"msg":"incompatible CNI versions","details":"config is newer"}'


class Node:
    """The files of one node under a test's directory, and a runtime that calls the plugin there."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.bin = root / "bin"
        self.data = root / "flannel"
        self.log = root / "log"
        self.bin.mkdir()
        self.log.mkdir()
        (root / "subnet.env").write_text(SUBNET_ENV)
        self.notes: list[str] = []
        self.path = str(self.bin)

    def delegate(self, script: str, name: str = "bridge") -> None:
        """Install a delegate; $C is the command, $IN its stdin, and each call is logged.

        The version in its configuration is $V.
        """
        path = self.bin / name
        path.write_text(
            f"""#!/bin/sh
C=$CNI_COMMAND
IN=$(cat)
V=$(echo "$IN" | sed 's/.*"cniVersion":"\\([^"]*\\)".*/\\1/')
echo "$C $CNI_CONTAINERID $CNI_IFNAME $CNI_NETNS $V" >> {self.log}/calls
echo "$IN" > {self.log}/$C
{script}
"""
        )
        path.chmod(0o755)

    def calls(self) -> list[str]:
        """What the delegate was asked since the last time: `COMMAND id ifname netns version`."""
        path = self.log / "calls"
        text = path.read_text() if path.exists() else ""
        path.unlink(missing_ok=True)
        return text.splitlines()

    def conf(self, version: str) -> dict[str, object]:
        return {
            "cniVersion": version,
            "name": "cbr0",
            "type": "flannel",
            "subnetFile": f"{self.root}/subnet.env",
            "dataDir": str(self.data),
            "delegateMode": "exec",
            "ipam": {"dataDir": f"{self.root}/networks"},
        }

    def call(
        self,
        command: str,
        container_id: str = "c1",
        ifname: str = "eth0",
        version: str = "1.1.0",
        keys: Mapping[str, object] | None = None,
        **extra: object,
    ) -> Any:
        """The parsed stdout: a result, an error object or None."""
        env = {
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": container_id,
            "CNI_IFNAME": ifname,
            "CNI_NETNS": "/netns/x",
            "CNI_PATH": self.path,
            "PATH": "/usr/bin:/bin",
        }
        request = Request(env, json.dumps({**self.conf(version), **extra, **(keys or {})}).encode())
        response = handle(request, Flannel(LocalHost(self.notes.append, {})))
        assert response.stderr == "", "a bug in the plugin"
        document = json.loads(response.stdout) if response.stdout else None
        assert ("code" in (document or {})) == (response.exit_code != 0)
        return document

    def files(self) -> dict[str, str]:
        """The content of every scratch file."""
        if not self.data.exists():
            return {}
        return {one.name: one.read_text() for one in sorted(self.data.iterdir())}

    def reserve(self, address: str, content: str) -> None:
        store = self.root / "networks" / "cbr0"
        store.mkdir(parents=True, exist_ok=True)
        (store / address).write_bytes(content.encode())


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


# ADD answers in the version of its configuration; everything else succeeds silently.
WORKING = f"[ $C != ADD ] || echo '{RESULT}' | sed s/VERSION/$V/"


def failing(command: str, how: str) -> str:
    """A delegate that fails in one command and works in the others."""
    return f"if [ $C = {command} ]; then {how}\nfi\n{WORKING}"


REFUSES = """echo '{"code":42,"msg":"no","details":"because"}'; exit 1"""


class TestAddAndDel:
    def test_the_delegate_sees_the_same_bytes_in_add_scratch_and_del(self, node: Node) -> None:
        node.delegate(WORKING)
        assert node.call("ADD", version="1.0.0") == {
            "cniVersion": "1.0.0",
            "ips": [{"address": "10.1.17.2/24"}],
        }
        scratch = node.files()
        assert list(scratch) == ["c1", "c1@eth0"]
        assert scratch["c1"] == scratch["c1@eth0"] == (node.log / "ADD").read_text().rstrip("\n")
        assert json.loads(scratch["c1"])["type"] == "bridge"
        (node.root / "subnet.env").unlink()
        assert node.call("DEL", version="1.0.0", runtimeConfig={"late": True}) is None
        assert (node.log / "DEL").read_text() == (node.log / "ADD").read_text()
        assert node.calls() == ["ADD c1 eth0 /netns/x 1.0.0", "DEL c1 eth0 /netns/x 1.0.0"]
        assert (node.files(), node.notes) == ({}, [])

    def test_del_again_and_del_of_nothing_start_no_process(self, node: Node) -> None:
        node.delegate(WORKING)
        assert node.call("DEL") is None
        assert node.calls() == [] and node.files() == {}

    def test_the_result_is_converted_to_the_requested_version(self, node: Node) -> None:
        fixed = RESULT.replace("VERSION", "0.4.0")
        node.delegate(f"[ $C != ADD ] || echo '{fixed}'")
        assert node.call("ADD", version="1.0.0")["ips"] == [{"address": "10.1.17.2/24"}]
        assert node.call("ADD", "c2", version="0.2.0") == {
            "cniVersion": "0.2.0",
            "ip4": {"ip": "10.1.17.2/24"},
            "dns": {},
        }

    def test_a_result_without_version_has_that_of_the_configuration(self, node: Node) -> None:
        node.delegate("""[ $C != ADD ] || echo '{"ips":[{"version":"4","address":"10.1.17.2/24"}]}'""")
        assert node.call("ADD", version="0.3.1")["cniVersion"] == "0.3.1"

    def test_stderr_of_the_delegate_is_passed_on_and_bounded(self, node: Node) -> None:
        node.delegate(f"echo careful >&2; {WORKING}")
        node.call("ADD")
        assert node.notes == ["careful"]
        node.delegate(f"head -c 1000000 /dev/zero | tr '\\0' x >&2; {WORKING}")
        node.call("ADD", "c2")
        assert len(node.notes[1]) == 65536

    def test_a_large_configuration_reaches_a_delegate_that_talks_first(self, node: Node) -> None:
        path = node.bin / "bridge"
        path.write_text(
            "#!/bin/sh\nhead -c 200000 /dev/zero | tr '\\0' ' '\n"
            f"cat > {node.log}/in\n[ $CNI_COMMAND != ADD ] || echo '{RESULT.replace('VERSION', '1.1.0')}'\n"
        )
        path.chmod(0o755)
        big = "x" * 300_000
        assert node.call("ADD", delegate={"big": big})["cniVersion"] == "1.1.0"
        assert json.loads((node.log / "in").read_text())["big"] == big

    def test_a_delegate_does_not_inherit_pythons_ignored_signals(self, node: Node) -> None:
        node.delegate(f"grep SigIgn /proc/self/status >&2; {WORKING}")
        node.call("ADD")
        ignored = int(node.notes[0].split()[1], 16)
        assert not ignored & (1 << 12 | 1 << 24)  # SIGPIPE 13, SIGXFSZ 25


class TestTwoInterfaces:
    def test_each_is_deleted_with_its_own_configuration(self, node: Node) -> None:
        node.delegate(WORKING)
        node.call("ADD", ifname="eth0")
        node.call("ADD", ifname="net1", delegate={"bridge": "other"})
        files = node.files()
        assert list(files) == ["c1", "c1@eth0", "c1@net1"]
        node.call("DEL", ifname="net1")
        assert json.loads((node.log / "DEL").read_text())["bridge"] == "other"
        assert node.files() == {"c1": files["c1@eth0"], "c1@eth0": files["c1@eth0"]}
        node.call("DEL", ifname="net1")
        node.call("DEL", ifname="eth0")
        assert "bridge" not in json.loads((node.log / "DEL").read_text())
        assert node.files() == {}
        assert [one.split()[0::2][:2] for one in node.calls()] == [
            ["ADD", "eth0"],
            ["ADD", "net1"],
            ["DEL", "net1"],
            ["DEL", "eth0"],
        ]


class TestFailedAdd:
    @pytest.mark.parametrize(
        ("how", "code", "msg"),
        [
            (REFUSES, 42, "no"),
            ("""echo '{"code":100,"msg":"only"}' ; exit 7""", 100, "only"),
            (
                "exit 3",
                999,
                'netplugin failed: delegate "bridge" (BIN/bridge), exit status 3, no error message',
            ),
            (
                "echo broken >&2; exit 2",
                999,
                'netplugin failed: delegate "bridge" (BIN/bridge), exit status 2: "broken"',
            ),
            (
                "kill -9 $$",
                999,
                'netplugin failed: delegate "bridge" (BIN/bridge), killed by signal 9, no error message',
            ),
            (
                "kill -TERM $$",
                999,
                'netplugin failed: delegate "bridge" (BIN/bridge), killed by signal 15, no error message',
            ),
            (
                "echo 'not json'; exit 1",
                999,
                'netplugin failed but error parsing its diagnostic message "not json": ',
            ),
            (
                """echo '{"ips":[]}{"code":8}'; exit 1""",
                999,
                'netplugin failed but error parsing its diagnostic message "{\\"ips\\":[]}{\\"code\\":8}": ',
            ),
            (
                """echo '{"x":1}'; exit 1""",
                999,
                'netplugin failed: delegate "bridge" (BIN/bridge), exit status 1, no',
            ),
            ("exit 0", 999, "failed to delegate add: failed to unmarshal raw result: unexpected end of JSON"),
            ("echo hello; exit 0", 999, "failed to delegate add: failed to unmarshal raw result: "),
            (
                """echo '{"cniVersion":"9.9.9"}'; exit 0""",
                999,
                'failed to delegate add: unsupported CNI result version "9.9.9"',
            ),
        ],
    )
    def test_every_kind_is_reported_and_undone(self, node: Node, how: str, code: int, msg: str) -> None:
        node.delegate(failing("ADD", how))
        error = node.call("ADD")
        assert error["code"] == code
        assert error["msg"].startswith(msg.replace("BIN", str(node.bin))) and "\n" not in error["msg"]
        assert node.calls() == ["ADD c1 eth0 /netns/x 1.1.0", "DEL c1 eth0 /netns/x 1.1.0"]
        assert node.files() == {}

    def test_details_of_the_delegate_are_kept(self, node: Node) -> None:
        node.delegate(failing("ADD", REFUSES))
        assert node.call("ADD") == {"code": 42, "msg": "no", "details": "because"}

    def test_an_endless_answer_is_cut_off(self, node: Node) -> None:
        node.delegate(failing("ADD", "exec cat /dev/zero"))
        error = node.call("ADD")
        assert "killed by signal 9" in error["msg"] and len(error["msg"]) < 4000

    def test_a_result_that_cannot_be_converted_is_undone(self, node: Node) -> None:
        node.delegate("""[ $C != ADD ] || echo '{"cniVersion":"1.0.0"}'""")
        error = node.call("ADD", version="0.2.0")
        assert error["msg"] == "failed to delegate add: cannot convert: no valid IP addresses"
        assert [one.split()[0] for one in node.calls()] == ["ADD", "DEL"]
        assert node.files() == {}

    def test_the_scratch_file_stays_if_undoing_fails_too(self, node: Node) -> None:
        node.delegate(REFUSES)
        assert node.call("ADD")["code"] == 42
        assert list(node.files()) == ["c1", "c1@eth0"]
        assert node.notes == ["flannel: undoing the failed ADD failed too, DEL will do it: no; because"]
        node.delegate(WORKING)
        assert node.call("DEL") is None
        assert node.files() == {}

    def test_of_two_interfaces_attached_at_the_same_time_each_is_detached_with_its_own(
        self, node: Node
    ) -> None:
        """containerd attaches the networks of a pod side by side."""
        here = f"{node.root}/here"
        both = f"touch {here}.$CNI_IFNAME; while [ $(ls {here}.* | wc -l) -lt 2 ]; do sleep 0.01; done"
        node.delegate(f"[ $C = ADD ] && {{ {both}; }}\n{WORKING}")
        with ThreadPoolExecutor(2) as threads:
            for made in [
                threads.submit(node.call, "ADD", ifname=name, keys={"name": f"of-{name}"})
                for name in ("eth0", "net1")
            ]:
                assert "ips" in made.result()
        node.calls()
        for name in ("net1", "eth0"):
            assert node.call("DEL", ifname=name, keys={"name": f"of-{name}"}) is None
            assert json.loads((node.log / "DEL").read_text())["name"] == f"of-{name}"
        assert [one.split()[2] for one in node.calls()] == ["net1", "eth0"]
        assert node.files() == {}

    def test_a_second_add_leaves_the_live_attachment_alone(self, node: Node) -> None:
        node.delegate(WORKING)
        node.call("ADD")
        before = node.files()
        node.calls()
        node.delegate(failing("ADD", REFUSES))
        assert node.call("ADD", delegate={"bridge": "other"})["code"] == 42
        assert node.calls() == ["ADD c1 eth0 /netns/x 1.1.0"]
        assert node.files() == before

    def test_a_second_add_leaves_what_upstream_attached_alone(self, node: Node) -> None:
        node.delegate(failing("ADD", REFUSES))
        node.data.mkdir()
        (node.data / "c1").write_text('{"type":"bridge"}')
        node.call("ADD")
        assert [one.split()[0] for one in node.calls()] == ["ADD"]
        assert node.files() == {"c1": '{"type":"bridge"}'}

    def test_a_second_add_that_succeeds_is_saved(self, node: Node) -> None:
        node.delegate(WORKING)
        node.call("ADD")
        node.call("ADD", delegate={"bridge": "other"})
        assert {json.loads(text)["bridge"] for text in node.files().values()} == {"other"}

    def test_one_interface_failing_leaves_the_other_ones_files(self, node: Node) -> None:
        node.delegate(WORKING)
        node.call("ADD")
        before = node.files()
        node.delegate(failing("ADD", REFUSES))
        node.call("ADD", ifname="net1")
        assert node.files() == before


class TestLookup:
    @pytest.mark.parametrize(
        ("kind", "msg"),
        [
            ("absent", 'failed to delegate add: failed to find plugin "absent" in path [/no/where BIN]'),
            ("", "failed to delegate add: no plugin name provided"),
            ("../bridge", "failed to delegate add: invalid plugin name: ../bridge"),
        ],
    )
    def test_what_cannot_be_found(self, node: Node, kind: str, msg: str) -> None:
        node.path = f"/no/where:{node.bin}"
        error = node.call("ADD", delegate={"type": kind})
        assert error == {"code": 999, "msg": msg.replace("BIN", str(node.bin))}
        assert node.files() == {}

    def test_the_first_executable_file_counts(self, node: Node) -> None:
        first, second, third = (node.root / name for name in ("first", "second", "third"))
        for directory in (first, second, third):
            directory.mkdir()
        (first / "bridge").mkdir()
        (second / "bridge").write_text("not executable")
        node.delegate(WORKING)
        (third / "bridge").symlink_to(node.bin / "bridge")
        node.path = f"{first}:{second}:{third}"
        assert "ips" in node.call("ADD")

    def test_what_cannot_be_executed(self, node: Node) -> None:
        (node.bin / "bridge").write_bytes(b"\x7fELFgarbage")
        (node.bin / "bridge").chmod(0o755)
        error = node.call("ADD")
        text = (
            f"failed to delegate add: netplugin failed: cannot execute {node.bin}/bridge: exec format error"
        )
        assert error == {"code": 999, "msg": text}

    def test_an_executable_that_is_being_written_is_tried_again(
        self, node: Node, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        node.delegate(WORKING)
        writer = (node.bin / "bridge").open("ab")
        monkeypatch.setattr("cni.plugins.delegate._BUSY_PAUSE_S", 0.0)
        monkeypatch.setattr("time.sleep", lambda _: writer.close())
        assert "ips" in node.call("ADD")

    def test_an_executable_that_stays_busy_is_an_error(
        self, node: Node, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        node.delegate(WORKING)
        monkeypatch.setattr("cni.plugins.delegate._BUSY_PAUSE_S", 0.0)
        with (node.bin / "bridge").open("ab"):
            assert node.call("ADD")["msg"].endswith("bridge: text file busy")


class TestDelWithoutAGoodScratchFile:
    def test_a_failed_del_keeps_it_and_the_retry_succeeds(self, node: Node) -> None:
        node.delegate(WORKING)
        node.call("ADD")
        before = node.files()
        node.delegate(failing("DEL", REFUSES))
        assert node.call("DEL") == {"code": 42, "msg": "no", "details": "because"}
        assert node.files() == before
        node.delegate(WORKING)
        assert node.call("DEL") is None
        assert node.files() == {}

    @pytest.mark.parametrize("broken", ["", '{"cniVersion":"1.0.0","ipM', "{}", "null", "[]", '{"type":1}'])
    @pytest.mark.parametrize("with_env", [True, False])
    def test_a_broken_one_is_rebuilt(self, node: Node, broken: str, with_env: bool) -> None:
        node.delegate(WORKING)
        node.call("ADD")
        added = json.loads((node.log / "ADD").read_text())
        for name in ("c1", "c1@eth0"):
            (node.data / name).write_text(broken)
        if not with_env:
            (node.root / "subnet.env").unlink()
        assert node.call("DEL") is None
        deleted = json.loads((node.log / "DEL").read_text())
        if not with_env:
            assert deleted["ipam"].pop("ranges") == [[{"subnet": "192.0.2.0/24"}]]
            assert (deleted["ipam"].pop("routes"), deleted.pop("mtu")) == ([], 0)
            for name in ("ranges", "routes"):
                added["ipam"].pop(name)
            added.pop("mtu")
        assert deleted == added
        assert node.files() == {}

    def test_a_broken_one_stays_if_the_delegate_fails(self, node: Node) -> None:
        node.delegate(REFUSES)
        node.data.mkdir()
        (node.data / "c1").write_text("{")
        assert node.call("DEL")["code"] == 42
        assert node.files() == {"c1": "{"}

    @pytest.mark.parametrize("content", ["c1\r\neth0", "c1", " c1\r\neth0\n"])
    @pytest.mark.parametrize("with_env", [True, False])
    def test_a_lost_one_is_made_up_for_while_an_address_is_held(
        self, node: Node, content: str, with_env: bool
    ) -> None:
        node.delegate(WORKING)
        node.reserve("10.1.17.2", content)
        if not with_env:
            (node.root / "subnet.env").unlink()
        assert node.call("DEL") is None
        assert node.calls() == ["DEL c1 eth0 /netns/x 1.1.0"]
        ipam = json.loads((node.log / "DEL").read_text())["ipam"]
        assert (ipam["type"], ipam["dataDir"]) == ("host-local", f"{node.root}/networks")

    @pytest.mark.parametrize("content", ["c1\r\nnet1", "c11\r\neth0", "c1\neth0", ""])
    def test_addresses_of_others_do_not_matter(self, node: Node, content: str) -> None:
        node.delegate(WORKING)
        node.reserve("10.1.17.2", content)
        assert node.call("DEL") is None
        assert node.calls() == []

    def test_making_up_for_it_is_best_effort(self, node: Node) -> None:
        node.delegate(REFUSES)
        node.reserve("10.1.17.2", "c1\r\neth0")
        assert node.call("DEL") is None
        assert node.notes[-1] == "flannel: releasing it failed: no; because"

    def test_an_unreadable_one_is_an_error(self, node: Node) -> None:
        (node.data / "c1").mkdir(parents=True)
        error = node.call("DEL")
        assert error == {
            "code": 999,
            "msg": f"cannot read the scratch file {node.data}/c1: is a directory",
        }

    def test_what_any_version_of_upstream_saved_is_used_as_it_is(self, node: Node) -> None:
        node.delegate(WORKING, name="macvlan")
        node.data.mkdir()
        old = (
            ' {"type":"macvlan", "name":"old","ipam":{"subnet":"10.1.17.0/24","type":"host-local"}, "x":1.0 }'
        )
        (node.data / "c1").write_text(old)
        assert node.call("DEL", version="0.3.1") is None
        assert (node.log / "DEL").read_text().rstrip("\n").endswith(old.lstrip())
        assert node.files() == {}


def speaks(*versions: str) -> str:
    """A delegate of these versions, which behaves as the Go plugins do."""
    listed = ",".join(f'"{one}"' for one in versions)
    answer = f'{{"cniVersion":"1.0.0","supportedVersions":[{listed}]}}'
    return f"""if [ $C = VERSION ]; then echo '{answer}'; exit 0; fi
case " {" ".join(versions)} " in
*" $V "*) ;;
*) echo '{VERSION_ERROR}'; exit 1 ;;
esac
{WORKING}"""


class TestOlderDelegate:
    def test_it_is_run_in_the_newest_version_that_it_knows(self, node: Node) -> None:
        node.delegate(speaks("0.3.1", "1.0.0", "0.4.0", "2.0.0", "x"))
        assert node.call("ADD", version="1.1.0") == {
            "cniVersion": "1.1.0",
            "ips": [{"address": "10.1.17.2/24"}],
        }
        assert {json.loads(text)["cniVersion"] for text in node.files().values()} == {"1.0.0"}
        assert node.call("DEL", version="1.1.0") is None
        assert [one.split()[0::4] for one in node.calls()] == [
            ["ADD", "1.1.0"],
            ["VERSION", "1.1.0"],
            ["ADD", "1.0.0"],
            ["DEL", "1.0.0"],
        ]
        assert node.files() == {}

    def test_forms_of_results_are_converted_back(self, node: Node) -> None:
        node.delegate(speaks("0.3.1"))
        assert node.call("ADD", version="1.0.0")["ips"] == [{"address": "10.1.17.2/24"}]
        assert node.call("CHECK", version="1.0.0", prevResult={}) is None
        assert "CHECK" not in "".join(node.calls())  # 0.3.1 has no CHECK

    @pytest.mark.parametrize("versions", [("1.1.0",), ("2.0.0",), ()])
    def test_a_delegate_without_older_version_gives_its_own_error(
        self, node: Node, versions: tuple[str, ...]
    ) -> None:
        node.delegate(speaks(*versions))
        error = node.call("ADD", version="1.0.0")
        assert error == json.loads(VERSION_ERROR)

    def test_a_delegate_without_version_gives_its_own_error(self, node: Node) -> None:
        node.delegate(f"echo '{VERSION_ERROR}'; exit 1")
        assert node.call("ADD") == json.loads(VERSION_ERROR)
        assert "did not tell its versions" in node.notes[0]

    def test_a_failure_in_the_older_version_is_undone_in_it(self, node: Node) -> None:
        node.delegate(speaks("1.0.0").replace(WORKING, failing("ADD", REFUSES)))
        assert node.call("ADD")["code"] == 42
        assert node.calls()[-1].split() == ["DEL", "c1", "eth0", "/netns/x", "1.0.0"]
        assert node.files() == {}

    def test_what_upstream_saved_for_a_newer_delegate_is_deleted(self, node: Node) -> None:
        node.delegate(speaks("0.4.0", "1.0.0"))
        node.data.mkdir()
        (node.data / "c1").write_text('{"cniVersion":"1.1.0","name":"cbr0","type":"bridge"}')
        assert node.call("DEL") is None
        assert node.calls()[-1].split()[0::4] == ["DEL", "1.0.0"]
        assert node.files() == {}


class TestCheck:
    PREVIOUS: dict[str, object] = {  # noqa: RUF012 - read only
        "cniVersion": "1.0.0",
        "interfaces": [{"name": "eth0", "sandbox": "/netns/x"}],
        "ips": [{"interface": 0, "address": "10.1.17.2/24"}],
    }

    def test_the_delegate_gets_the_saved_configuration_and_prev_result(self, node: Node) -> None:
        node.delegate(WORKING)
        node.call("ADD", version="1.0.0")
        saved = json.loads(node.files()["c1"])
        assert node.call("CHECK", version="1.0.0", prevResult=self.PREVIOUS) is None
        assert json.loads((node.log / "CHECK").read_text()) == {**saved, "prevResult": self.PREVIOUS}

    def test_prev_result_has_the_version_of_the_saved_configuration(self, node: Node) -> None:
        node.delegate(speaks("0.4.0"))
        node.call("ADD", version="1.0.0")
        assert node.call("CHECK", version="1.0.0", prevResult=self.PREVIOUS) is None
        assert json.loads((node.log / "CHECK").read_text())["prevResult"] == {
            "cniVersion": "0.4.0",
            "interfaces": self.PREVIOUS["interfaces"],
            "ips": [{"version": "4", "interface": 0, "address": "10.1.17.2/24"}],
            "dns": {},
        }

    def test_routes_in_prev_result_name_the_gateway_that_the_kernel_has(self, node: Node) -> None:
        node.delegate(WORKING)
        node.call("ADD")
        ips = [{"address": "10.1.17.2/24", "gateway": "10.1.17.1"}]
        node.call("CHECK", prevResult={"ips": ips, "routes": [{"dst": "10.1.0.0/16"}]})
        passed = json.loads((node.log / "CHECK").read_text())["prevResult"]
        assert passed["routes"] == [{"dst": "10.1.0.0/16", "gw": "10.1.17.1"}]

    def test_errors_of_the_delegate_are_passed_on(self, node: Node) -> None:
        node.delegate(failing("CHECK", REFUSES))
        node.call("ADD")
        assert node.call("CHECK", prevResult=self.PREVIOUS)["code"] == 42

    def test_an_unreadable_prev_result(self, node: Node) -> None:
        node.delegate(WORKING)
        node.call("ADD")
        error = node.call("CHECK", prevResult={"cniVersion": "7"})
        assert error == {
            "code": 6,
            "msg": 'could not parse prevResult: unsupported CNI result version "7"',
        }

    @pytest.mark.parametrize(
        ("saved", "fault"), [(None, "there is no scratch file"), ("{", "the scratch file is broken")]
    )
    def test_an_unknown_attachment_is_an_error(self, node: Node, saved: str | None, fault: str) -> None:
        if saved is not None:
            node.data.mkdir()
            (node.data / "c1").write_text(saved)
        error = node.call("CHECK")
        assert error["code"] == 999
        assert error["msg"].startswith(f"cannot check c1 eth0: {fault} in {node.data}")


TOO_OLD = [
    VERSION_ERROR,
    '{"code":4,"msg":"unknown CNI_COMMAND: STATUS"}',
    '{"code":1,"msg":"config version does not allow STATUS"}',
]


class TestStatus:
    def test_the_delegate_is_asked(self, node: Node) -> None:
        node.delegate(WORKING)
        assert node.call("STATUS") is None
        assert json.loads((node.log / "STATUS").read_text())["ipam"]["type"] == "host-local"
        node.delegate(failing("STATUS", """echo '{"code":51,"msg":"full"}'; exit 1"""))
        assert node.call("STATUS") == {"code": 51, "msg": "full"}

    @pytest.mark.parametrize("answer", TOO_OLD)
    def test_a_delegate_too_old_for_it_is_fine(self, node: Node, answer: str) -> None:
        node.delegate(f"echo '{answer}'; exit 1")
        assert node.call("STATUS") is None

    @pytest.mark.parametrize("content", [None, "FLANNEL_NETWORK", "FLANNEL_MTU=1"])
    def test_without_a_usable_subnet_env_nothing_can_be_served(self, node: Node, content: str | None) -> None:
        node.delegate(WORKING)
        path = node.root / "subnet.env"
        path.unlink() if content is None else path.write_text(content)
        error = node.call("STATUS")
        assert error["code"] == 50
        assert (
            error["msg"].startswith("failed to load flannel 'subnet.env' file: ")
            and str(path) in error["msg"]
        )
        assert node.calls() == []
        assert node.call("ADD")["code"] == 11
        assert node.files() == {}

    def test_a_missing_delegate_is_named_with_the_path(self, node: Node) -> None:
        error = node.call("STATUS", delegate={"type": "macvlan"})
        assert error["code"] == 50
        assert f'failed to find plugin "macvlan" in path [{node.bin}]' in error["msg"]
        assert "CNI_PATH" in error["msg"]


def valid(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"containerID": container_id, "ifname": ifname} for container_id, ifname in pairs]


VALID = "cni.dev/valid-attachments"


class TestGc:
    @pytest.fixture(autouse=True)
    def attachments(self, node: Node) -> None:
        """Live c1 eth0, stale c1 net1 and c2 eth0, and c3 of another network."""
        node.delegate(WORKING)
        node.call("ADD", "c1", "eth0")
        node.call("ADD", "c1", "net1")
        node.call("ADD", "c2", "eth0")
        node.call("ADD", "c3", "eth0", name="other")
        node.calls()

    @pytest.mark.parametrize("key", [VALID, "cni.dev/attachments"])
    def test_stale_attachments_are_deleted_without_namespace(self, node: Node, key: str) -> None:
        assert node.call("GC", keys={key: valid(("c1", "eth0"), ("c9", "eth0"))}) is None
        assert node.calls() == ["DEL c1 net1  1.1.0", "DEL c2 eth0  1.1.0", "GC c1 eth0 /netns/x 1.1.0"]
        assert list(node.files()) == ["c1", "c1@eth0", "c3", "c3@eth0"]
        assert json.loads((node.log / "GC").read_text())[key] == valid(("c1", "eth0"), ("c9", "eth0"))

    def test_an_empty_list_means_that_none_is_valid(self, node: Node) -> None:
        assert node.call("GC", keys={VALID: []}) is None
        assert list(node.files()) == ["c3", "c3@eth0"]

    @pytest.mark.parametrize("extra", [{}, {VALID: None}])
    def test_without_a_list_only_the_delegate_collects(self, node: Node, extra: dict[str, object]) -> None:
        before = node.files()
        assert node.call("GC", keys=extra) is None
        assert [one.split()[0] for one in node.calls()] == ["GC"]
        assert node.files() == before

    def test_it_goes_on_past_failures_and_tells_them(self, node: Node) -> None:
        node.delegate(f'if [ "$C $CNI_CONTAINERID" = "DEL c1" ]; then {REFUSES}; fi')
        error = node.call("GC", keys={VALID: []})
        assert error["code"] == 999
        assert error["msg"] == (
            "garbage collection is incomplete: DEL of c1 eth0: no; because; DEL of c1 net1: no; because"
        )
        assert list(node.files()) == ["c1", "c1@eth0", "c1@net1", "c3", "c3@eth0"]

    @pytest.mark.parametrize("answer", TOO_OLD)
    def test_a_delegate_too_old_for_it_is_fine(self, node: Node, answer: str) -> None:
        node.delegate(failing("GC", f"echo '{answer}'; exit 1"))
        assert node.call("GC", keys={VALID: []}) is None

    def test_errors_of_the_delegates_gc_are_passed_on(self, node: Node) -> None:
        node.delegate(failing("GC", REFUSES))
        assert node.call("GC")["msg"] == "garbage collection is incomplete: GC of the delegate: no; because"

    def test_it_needs_no_subnet_env(self, node: Node) -> None:
        (node.root / "subnet.env").unlink()
        assert node.call("GC", keys={VALID: []}) is None
        assert list(node.files()) == ["c3", "c3@eth0"]

    def test_files_of_upstream_take_their_interfaces_from_the_store(self, node: Node) -> None:
        for name in ("u1", "u2", "u3"):
            (node.data / name).write_text('{"cniVersion":"1.1.0","name":"cbr0","type":"bridge"}')
        (node.data / "u4").write_text('{"cniVersion":"1.1.0","name":"other","type":"bridge"}')
        (node.data / "u5").write_text("broken")
        node.reserve("10.1.17.9", "u1\r\nnet7")
        node.reserve("10.1.17.8", "u1\r\nnet6")
        live = valid(("c1", "eth0"), ("c1", "net1"), ("c2", "eth0"), ("u3", "net1"))
        assert node.call("GC", keys={VALID: live}) is None
        assert node.calls()[:-1] == ["DEL u1 net6  1.1.0", "DEL u1 net7  1.1.0", "DEL u2 eth0  1.1.0"]
        assert [name for name in node.files() if name.startswith("u")] == ["u3", "u4", "u5"]


@pytest.mark.parametrize(
    ("command", "msg"),
    [
        (
            "ADD",
            "failed to load flannel netconf file: failed to load netconf: json: delegate must be an object",
        ),
        ("DEL", "failed to load netconf: json: delegate must be an object"),
        ("STATUS", "failed to load netconf: json: delegate must be an object"),
    ],
)
def test_keys_of_wrong_type_are_named(node: Node, command: str, msg: str) -> None:
    error = node.call(command, delegate=[])
    assert error == {"code": 999, "msg": f"{msg}, found array"}


def test_the_delegates_are_looked_at_after_subnet_env(node: Node) -> None:
    (node.root / "subnet.env").unlink()
    assert node.call("ADD", delegate={"name": "x"})["code"] == 11


def test_a_configuration_too_deep_to_be_written_is_a_decoding_failure(node: Node) -> None:
    node.delegate(WORKING)
    deep: object = 1
    for _ in range(600):
        deep = [deep]
    assert node.call("ADD", delegate={"deep": deep})["code"] == 6
