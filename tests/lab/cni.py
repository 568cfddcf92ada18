"""What a container runtime does with CNI plugins: libcni's part, small.

Source: CNI specification, sections 2 to 4, and the behaviour of libcni where that is silent: the final
result is cached and handed to every plugin on CHECK and DEL; a failed ADD is not undone by itself; the
`capabilities` stay in the configuration that the plugin sees.
"""

from __future__ import annotations

import base64
import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.lab.net import ENVIRONMENT, LabError, program

PLUGIN_S = 60.0

Json = dict[str, Any]


class PluginError(LabError):
    """A plugin refused. `code`, `msg` and `details` are its own; code 0 means that it gave none."""

    def __init__(self, plugin: str, command: str, error: Mapping[str, Any], log: Path) -> None:
        self.plugin = plugin
        self.code = int(error.get("code", 0))
        self.msg = str(error.get("msg", ""))
        self.details = str(error.get("details", ""))
        text = f'plugin type="{plugin}" failed ({command.lower()}), code {self.code}: {self.msg}'
        super().__init__(f"{text}; {self.details}" if self.details else text, log)


@dataclass(frozen=True, slots=True)
class Attachment:
    """One interface of one container. `netns` is a path; it may be empty for DEL."""

    container_id: str
    netns: str
    ifname: str = "eth0"
    args: str = ""
    capability_args: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What a result says about the attached interface; `address` is the first of `addresses`."""

    address: str
    mac: str
    host_veth: str
    gateway: str
    addresses: tuple[str, ...]

    @classmethod
    def of(cls, result: Json, ifname: str = "eth0") -> Endpoint:
        """Read a result of CNI 1.0.0 ("Add Success"); raises LabError if the interface is not in it."""
        interfaces = list(enumerate(result.get("interfaces", [])))
        inside = [(i, link) for i, link in interfaces if link["name"] == ifname and link.get("sandbox")]
        if not inside:
            raise LabError(f"the ADD result lists no interface {ifname} with a sandbox: {json.dumps(result)}")
        index, link = inside[0]
        addresses = [ip for ip in result.get("ips", []) if ip.get("interface") == index]
        veths = [other["name"] for _, other in interfaces if other["name"].startswith("veth")]
        if not addresses or not veths:
            raise LabError(f"the ADD result lists no address or no host veth: {json.dumps(result)}")
        plain = tuple(ip["address"].partition("/")[0] for ip in addresses)
        return cls(plain[0], link["mac"], veths[0], addresses[0].get("gateway", ""), plain)

    @property
    def address6(self) -> str:
        """The interface's first IPv6 address; raises LabError if it has none."""
        for address in self.addresses:
            if ":" in address:
                return address
        raise LabError(f"the interface has no IPv6 address, only {', '.join(self.addresses)}")


class Runtime:
    """Runs the plugins of one network configuration list in a node's namespace.

    `conflist` is the parsed file of /etc/cni/net.d, `cni_path` the folders searched for plugins,
    `cache_dir` takes the results; the plugins' stderr is appended to `<cache_dir>/plugins.log`.
    `cni_socket` is the node's daemon, None for the one at the usual place.
    Methods raise PluginError when a plugin refuses, LabError when one cannot be run.
    """

    def __init__(
        self,
        conflist: Json,
        cni_path: Sequence[Path],
        cache_dir: Path,
        netns: str,
        cni_socket: Path | None = None,
    ) -> None:
        self._socket = {} if cni_socket is None else {"FLANNEL_CNI_SOCKET": str(cni_socket)}
        self.conflist = conflist
        self.netns = netns
        self._cni_path = [str(path) for path in cni_path]
        self._results = cache_dir / "results"
        self._results.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._log = cache_dir / "plugins.log"

    def add(self, attachment: Attachment) -> Json:
        """Run ADD through the list, cache the final result and return it."""
        result: Json | None = None
        for plugin in self.conflist["plugins"]:
            result = json.loads(self._invoke("ADD", plugin, attachment, result))
        if result is None:
            raise LabError(f"network {self.conflist['name']!r} has no plugins")
        self._write_cache(attachment, result)
        return result

    def check(self, attachment: Attachment) -> None:
        """Run CHECK through the list, each plugin with the cached result of the ADD."""
        result = self._read_cache(attachment)
        if result is None:
            raise LabError(f"no cached result {self._cache(attachment)}; was it added?")
        for plugin in self.conflist["plugins"]:
            self._invoke("CHECK", plugin, attachment, result)

    def delete(self, attachment: Attachment) -> None:
        """Run DEL through the list backwards; the cache entry goes when every plugin has succeeded."""
        result = self._read_cache(attachment)
        for plugin in reversed(self.conflist["plugins"]):
            self._invoke("DEL", plugin, attachment, result)
        self._cache(attachment).unlink(missing_ok=True)

    def _cache(self, attachment: Attachment) -> Path:
        name = f"{self.conflist['name']}-{attachment.container_id}-{attachment.ifname}"
        return self._results / name

    def _write_cache(self, attachment: Attachment, result: Json) -> None:
        entry = {
            "kind": "cniCacheV1",
            "containerId": attachment.container_id,
            "config": base64.b64encode(json.dumps(self.conflist).encode()).decode(),
            "ifName": attachment.ifname,
            "networkName": self.conflist["name"],
            "netns": attachment.netns,
            "cniArgs": [pair.split("=", 1) for pair in attachment.args.split(";") if pair],
            "capabilityArgs": dict(attachment.capability_args),
            "result": result,
        }
        path = self._cache(attachment)
        path.touch(mode=0o600)
        path.write_text(json.dumps(entry))

    def _read_cache(self, attachment: Attachment) -> Json | None:
        """The cached result; an unreadable entry is removed, as libcni does, and counts as none."""
        path = self._cache(attachment)
        try:
            result: Json = json.loads(path.read_text())["result"]
        except (OSError, ValueError, KeyError):
            path.unlink(missing_ok=True)
            return None
        return result

    def _configuration(self, plugin: Json, attachment: Attachment, previous: Json | None) -> Json:
        """The plugin's stdin (CNI 1.0.0, "Deriving execution configuration from plugin configuration")."""
        config = {**plugin, "name": self.conflist["name"], "cniVersion": self.conflist["cniVersion"]}
        wanted = [key for key, on in plugin.get("capabilities", {}).items() if on]
        runtime = {
            key: attachment.capability_args[key] for key in wanted if key in attachment.capability_args
        }
        if runtime:
            config["runtimeConfig"] = runtime
        if previous is not None:
            config["prevResult"] = previous
        return config

    def _find(self, kind: str) -> str:
        for folder in self._cni_path:
            if Path(folder, kind).is_file():
                return f"{folder}/{kind}"
        raise LabError(f'failed to find plugin "{kind}" in path [{" ".join(self._cni_path)}]')

    def _invoke(self, command: str, plugin: Json, attachment: Attachment, previous: Json | None) -> str:
        executable = self._find(plugin["type"])
        environment = {
            **ENVIRONMENT,
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": attachment.container_id,
            "CNI_NETNS": attachment.netns,
            "CNI_IFNAME": attachment.ifname,
            "CNI_ARGS": attachment.args,
            "CNI_PATH": ":".join(self._cni_path),
            **self._socket,
        }
        try:
            done = subprocess.run(
                [program("ip"), "netns", "exec", self.netns, executable],
                input=json.dumps(self._configuration(plugin, attachment, previous)),
                capture_output=True,
                text=True,
                env=environment,
                timeout=PLUGIN_S,
                start_new_session=True,
                check=False,
            )
        except subprocess.TimeoutExpired as exc:
            raise LabError(f"{executable} {command}: no end after {PLUGIN_S:g} s", self._log) from exc
        with self._log.open("a") as log:
            log.write(
                f"{command} {plugin['type']} {attachment.container_id}: {done.returncode}\n{done.stderr}"
            )
        if done.returncode:
            raise PluginError(plugin["type"], command, _error(done), self._log)
        return done.stdout


def _error(done: subprocess.CompletedProcess[str]) -> Json:
    """The error object on stdout, or one made of what there is, in libcni's words."""
    if not done.stdout:
        said = json.dumps(done.stderr.strip()) if done.stderr else "with no error message"
        return {"msg": f"netplugin failed: {said}: exit status {done.returncode}"}
    try:
        error = json.loads(done.stdout)
    except ValueError as exc:
        return {"msg": f"netplugin failed but error parsing its diagnostic message {done.stdout!r}: {exc}"}
    return error if isinstance(error, dict) else {"msg": done.stdout}
