"""The flannel CNI plugin: turns subnet.env into the configuration of a delegate, and runs that.

    ADD     subnet.env -> delegate's configuration -> scratch file -> delegate ADD -> its result, converted
    DEL     scratch file -> delegate DEL -> scratch file removed, once the delegate succeeded
    CHECK   scratch file + prevResult -> delegate CHECK
    STATUS  subnet.env can be loaded? -> delegate STATUS
    GC      delegate DEL for each attachment the runtime no longer knows -> delegate GC

The configuration and the scratch files are upstream's to the byte, so ADD by one and DEL by the other works.

Decision: where upstream loses something, we do not. The result is converted to the requested version. A
failed ADD is undone. A failed DEL keeps the scratch file. A lost or broken scratch file is made up for from
stdin, subnet.env and host-local's store. A delegate older than the requested version is run with the newest
version that it knows. CHECK, STATUS and GC reach the delegate.

`delegateMode` of the netconf says who the delegate is: `exec` the executable in CNI_PATH, `builtin` our own
`bridge` in this process, `auto` (the default) that one if it knows every key of the delegate's configuration.

Source: CNI 1.1.0, "Section 4: Plugin Delegation"; upstream flannel-io/cni-plugin.
"""

from __future__ import annotations

from cni.errors import (
    DECODING_FAILURE,
    INCOMPATIBLE_VERSION,
    INTERNAL,
    INVALID_CONFIG,
    INVALID_ENVIRONMENT,
    NOT_AVAILABLE,
    CniError,
)
from cni.plugins import delegate, subnetenv
from cni.plugins.about import about
from cni.plugins.bridgeconf import KEYS as BRIDGE_KEYS
from cni.plugins.scratch import Scratch, reservations
from cni.spec import gojson, result, version
from cni.spec.address import parse_cidr
from cni.spec.netconf import VALID_ATTACHMENTS, NetConf
from cni.spec.request import Request

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cni.host import Host

    Made = bytes | gojson.Object  # a result, as a delegate printed it or as ours returned it

# host-local's DEL finds reservations by their content, but wants some valid range: TEST-NET-1 of RFC 5737.
_ANY_SUBNET = "192.0.2.0/24"
_USUAL_IFNAME = "eth0"
_AUTO, _BUILT_IN, _EXEC = "auto", "builtin", "exec"


class Flannel:
    """The plugin, for one call."""

    __slots__ = ("_host", "_mode")

    def __init__(self, host: Host) -> None:
        self._host = host
        self._mode = _AUTO

    @property
    def about(self) -> str:
        return about("flannel")

    def owns_netns(self, path: str) -> bool:
        """Whether `path` is the namespace that the runtime itself runs in."""
        return self._host.shares_netns(path)

    def add(self, request: Request) -> gojson.Object:
        """Attach, and return the result in the requested version; undone if it fails. Raises CniError."""
        conf = self._netconf(request, "failed to load flannel netconf file: ")
        env = subnetenv.read(self._host.files, conf.subnet_file)
        config, data = self._host.known(_delegates, request.stdin, env, conf.subnet_file)
        self._find(request, config)
        with Scratch(self._host, conf.data_dir) as scratch:
            existed = scratch.load(request.container_id, request.ifname) is not None
            try:
                used, data, printed = self._add(request, config, data, None if existed else scratch)
                made = _convert(printed, _version_of(used), conf.version or version.ABSENT)
            except CniError as exc:
                if not existed:
                    self._undo(request, scratch, exc)
                raise
            if existed:
                scratch.save(request.container_id, request.ifname, data)
        return made

    def delete(self, request: Request) -> None:
        """Detach; a repeated DEL succeeds. Raises CniError, and then keeps the scratch file for a retry."""
        conf = self._netconf(request)
        with Scratch(self._host, conf.data_dir) as scratch:
            saved = scratch.load(request.container_id, request.ifname)
            if saved is None:
                self._sweep(request, conf)
                self._host.afterwards(lambda: self._tidy(request, conf))
            else:
                self._detach(request, conf, saved)
                scratch.remove(request.container_id, request.ifname)

    def check(self, request: Request) -> None:
        """Have the delegate check the attachment against prevResult. Raises CniError."""
        conf = self._netconf(request)
        with Scratch(self._host, conf.data_dir) as scratch:
            saved = scratch.load(request.container_id, request.ifname)
        config = None if saved is None else _saved_config(saved)
        if config is None:
            fault = "there is no scratch file" if saved is None else "the scratch file is broken"
            attachment = f"{request.container_id} {request.ifname}"
            raise CniError(INTERNAL, f"cannot check {attachment}: {fault} in {conf.data_dir}, add it anew")
        wanted = _version_of(config)
        if wanted in version.SUPPORTED and not version.at_least(wanted, "0.4.0"):
            return  # the delegate's newest version has no CHECK
        if conf.prev_result is not None:
            try:
                known = result.parse(conf.prev_result, conf.version or version.ABSENT)
                config["prevResult"] = result.with_gateways(result.convert(known, wanted))
            except result.ResultError as exc:
                raise CniError(DECODING_FAILURE, f"could not parse prevResult: {exc}") from None
        self._delegate(request, "CHECK", config, _encode(config))

    def status(self, request: Request) -> None:
        """Whether an ADD could work: subnet.env and the delegate are there. Raises CniError (50 if not)."""
        conf = self._netconf(request)
        try:
            env = subnetenv.load(self._host.files, conf.subnet_file)
        except CniError as exc:
            raise CniError(NOT_AVAILABLE, exc.msg) from None
        try:
            self._if_known(request, "STATUS", delegate_config(conf, env))
        except delegate.DelegateMissing as exc:
            raise CniError(NOT_AVAILABLE, f"{exc.msg}: install it in a directory of CNI_PATH") from None

    def gc(self, request: Request) -> None:
        """Detach what the runtime no longer knows, then the delegate's GC; failures are raised at the end."""
        conf = self._netconf(request)
        failures: list[str] = []
        if conf.valid_attachments is not None:
            failures += self._collect(request, conf, conf.valid_attachments)
        try:
            config = self._rebuilt(conf)
            for name in VALID_ATTACHMENTS:
                if name in request.config:
                    config[name] = request.config[name]
            self._if_known(request, "GC", config)
        except CniError as exc:
            failures.append(f"GC of the delegate: {exc}")
        if failures:
            raise CniError(INTERNAL, f"garbage collection is incomplete: {'; '.join(failures)}")

    def _add(
        self, request: Request, config: gojson.Object, data: bytes, scratch: Scratch | None
    ) -> tuple[gojson.Object, bytes, Made]:
        """Run the delegate's ADD, saving its configuration first if `scratch` is given.

        `data` is `config` as it is written. Both come back as they were used, with the result.
        """

        def attempt(config: gojson.Object, data: bytes) -> tuple[gojson.Object, bytes, Made]:
            if scratch is not None:
                scratch.begin(request.container_id, request.ifname, data)
                # Of an ADD that fails and is undone nothing is there to complete.
                self._host.afterwards(lambda: scratch.complete(request.container_id, request.ifname, data))
            return config, data, self._delegate(request, "ADD", config, data)

        try:
            return attempt(config, data)
        except delegate.DelegateRefused as exc:
            lowered = self._lowered(request, config, exc)
            return attempt(lowered, _encode(lowered))

    def _tidy(self, request: Request, conf: NetConf) -> None:
        with Scratch(self._host, conf.data_dir) as scratch:
            scratch.remove_unfinished(request.container_id, request.ifname)

    def _undo(self, request: Request, scratch: Scratch, failure: CniError) -> None:
        """Take back a failed ADD; if the delegate cannot, the scratch file stays for the runtime's DEL."""
        try:
            saved = scratch.load(request.container_id, request.ifname)
            config = None if saved is None else _saved_config(saved)
            if saved is not None and config is not None:
                # Ours has undone its ADD itself, and what it cannot read fails its DEL as well. And an ADD of
                # what is attached already fails: undoing that would tear down a live interface.
                if not self._is_builtin(config) and not _was_there(failure):
                    self._delegate(request, "DEL", config, saved)
                scratch.remove(request.container_id, request.ifname)
        except CniError as exc:
            self._host.note(f"flannel: undoing the failed ADD failed too, DEL will do it: {exc}")

    def _detach(self, request: Request, conf: NetConf, saved: bytes) -> None:
        """Run the delegate's DEL with the saved bytes, or with a rebuilt configuration if they are broken."""
        config = _saved_config(saved)
        if config is None:
            attachment = f"{request.container_id} {request.ifname}"
            text = f"flannel: the scratch file of {attachment} is broken, using stdin and subnet.env"
            self._host.note(text)
            config = self._rebuilt(conf)
            saved = _encode(config)
        try:
            self._delegate(request, "DEL", config, saved, conf.prev_result)
        except delegate.DelegateRefused as exc:
            lowered = self._lowered(request, config, exc)
            self._delegate(request, "DEL", lowered, _encode(lowered))

    def _sweep(self, request: Request, conf: NetConf) -> None:
        """DEL without a scratch file: nothing to do, unless host-local still holds the attachment's address.

        Best effort: what fails is noted, and the DEL succeeds as upstream's does.
        """
        # With prevResult the bridge can tell the attachment's link from another, if it is still there.
        if conf.prev_result is None:
            if not (conf.store and self._holds_address(request, conf)):
                return
            attachment = f"{request.container_id} {request.ifname}"
            self._host.note(f"flannel: no scratch file of {attachment}, but an address in {conf.store}")
        try:
            self._detach(request, conf, _encode(self._rebuilt(conf)))
        except CniError as exc:
            self._host.note(f"flannel: releasing it failed: {exc}")

    def _holds_address(self, request: Request, conf: NetConf) -> bool:
        from cni.plugins.hostlocal import HostLocal

        try:
            return HostLocal(self._host).holds(conf.store, request)
        except CniError:
            return False

    def _collect(self, request: Request, conf: NetConf, valid: frozenset[tuple[str, str]]) -> list[str]:
        """Detach every attachment of this network that is not in `valid`; returns what failed."""
        live_containers = {container_id for container_id, _ in valid}
        failures = []
        with Scratch(self._host, conf.data_dir) as scratch:
            for container_id, ifname, saved in scratch.saved():
                config = _saved_config(saved)
                live = (container_id, ifname) in valid if ifname else container_id in live_containers
                if live or config is None or config.get("name") != conf.name:
                    continue
                try:
                    for name in [ifname] if ifname else _ifnames(self._host, conf, container_id):
                        self._detach(request.for_attachment("DEL", container_id, name), conf, saved)
                    scratch.remove(container_id, ifname)
                except CniError as exc:
                    failures.append(f"DEL of {container_id} {ifname}: {exc}")
        return failures

    def _rebuilt(self, conf: NetConf) -> gojson.Object:
        """The delegate's configuration from stdin and subnet.env; without the file, enough of it for DEL."""
        try:
            env = subnetenv.load(self._host.files, conf.subnet_file)
        except CniError as exc:
            self._host.note(f"flannel: going on without subnet.env: {exc}")
            env = subnetenv.SubnetEnv([], [parse_cidr(_ANY_SUBNET)], 0, ipmasq=True)
        return delegate_config(conf, env)

    def _if_known(self, request: Request, command: str, config: gojson.Object) -> None:
        """Run STATUS or GC; a delegate that is too old to know the command has nothing to say about it."""
        try:
            self._delegate(request, command, config, _encode(config))
        except delegate.DelegateRefused as exc:
            if exc.code not in (INCOMPATIBLE_VERSION, INVALID_ENVIRONMENT):
                raise

    def _lowered(
        self, request: Request, config: gojson.Object, refusal: delegate.DelegateRefused
    ) -> gojson.Object:
        """`config` in the newest version that the delegate knows, if that is why it refused; else raises."""
        if refusal.code != INCOMPATIBLE_VERSION:
            raise refusal
        best = version.best_below(self._versions(request, config), _version_of(config))
        if best is None:
            raise refusal
        return {**config, "cniVersion": best}

    def _versions(self, request: Request, config: gojson.Object) -> list[str]:
        """What the delegate answers to VERSION; nothing if it does not."""
        question: gojson.Object = {"cniVersion": _version_of(config)}
        try:
            said = self._delegate(request, "VERSION", config, _encode(question))
            record = gojson.load_object(said) if isinstance(said, bytes) else said
            offered: list[object] = gojson.typed(record, "supportedVersions", list, [])
        except (CniError, gojson.GoJsonError) as exc:
            self._host.note(f"flannel: the delegate did not tell its versions: {exc}")
            return []
        return [one for one in offered if isinstance(one, str)]

    def _find(self, request: Request, config: gojson.Object, command: str = "ADD") -> str:
        """Path of what has to be executed, empty for nothing; raises CniError, and Declined in the daemon."""
        kind = str(config["type"])
        if self._is_builtin(config):
            ipam = config.get("ipam")
            kind = str(ipam.get("type", "")) if isinstance(ipam, dict) else ""
            if kind in ("", "host-local"):
                return ""
        try:
            return self._host.find_program(kind, request.path)
        except CniError as exc:
            raise type(exc)(exc.code, f"failed to delegate {command.lower()}: {exc.msg}") from None

    def _is_builtin(self, config: gojson.Object) -> bool:
        """Whether our own bridge is the delegate for this configuration; raises CniError 7."""
        if self._mode == _EXEC:
            return False
        if config["type"] == "bridge":
            return self._mode == _BUILT_IN or BRIDGE_KEYS.issuperset(map(str.lower, config))
        if self._mode == _BUILT_IN:
            kind = gojson.dumps(config["type"])
            text = f"delegateMode is builtin, but of the delegates only bridge is built in, not {kind}"
            raise CniError(INVALID_CONFIG, text)
        return False

    def _delegate(
        self,
        request: Request,
        command: str,
        config: gojson.Object,
        stdin: bytes,
        prev_result: gojson.Object | None = None,
    ) -> Made:
        """Have the delegate that `config` names do `command`; its result, if any. Raises CniError.

        Our own is given a `prev_result` that is not in stdin.
        """
        environment = {**request.environment, "CNI_COMMAND": command}
        if self._is_builtin(config):
            made = Request(environment, stdin, lambda data: self._host.known(gojson.load_object, data))
            return self._call_builtin(made if prev_result is None else made.having("prevResult", prev_result))
        kind, path = str(config["type"]), self._find(request, config, command)
        try:
            return delegate.execute(self._host, kind, path, environment, stdin)
        except delegate.CannotExecute as exc:
            raise CniError(exc.code, f"failed to delegate {command.lower()}: {exc.msg}") from None

    def _call_builtin(self, request: Request) -> Made:
        from cni.plugins.bridge import Bridge

        version.check_supported(request.version)
        bridge = Bridge(self._host)
        match request.command:
            case "ADD":
                return bridge.add(request)
            case "DEL":
                bridge.delete(request)
            case "CHECK":
                bridge.check(request)
            case "STATUS":
                bridge.status(request)
            case "GC":
                bridge.gc(request)
        return b""

    def _netconf(self, request: Request, prefix: str = "") -> NetConf:
        try:
            conf = self._host.known(_parsed, request.stdin)
        except gojson.GoJsonError as exc:
            raise CniError(INTERNAL, f"{prefix}failed to load netconf: json: {exc}") from None
        if conf.delegate_mode not in (_AUTO, _BUILT_IN, _EXEC):
            found = gojson.dumps(conf.delegate_mode)
            text = f"delegateMode is {found}, it must be {_AUTO}, {_BUILT_IN} or {_EXEC}"
            raise CniError(INVALID_CONFIG, text)
        self._mode = conf.delegate_mode
        return conf


def _parsed(stdin: bytes) -> NetConf:
    return NetConf(gojson.load_object(stdin))


def _delegates(stdin: bytes, env: bytes, env_path: str) -> tuple[gojson.Object, bytes]:
    """The delegate's netconf for an ADD, and how it is written. Raises CniError."""
    config = delegate_config(_parsed(stdin), subnetenv.parsed(env, env_path))
    return config, _encode(config)


def _was_there(failure: CniError) -> bool:
    """Whether the delegate failed since the interface exists: then it is not this ADD's to take away."""
    text = f"{failure.msg} {failure.details}".lower()
    return "already exists" in text or "file exists" in text


def delegate_config(conf: NetConf, env: subnetenv.SubnetEnv) -> gojson.Object:
    """The delegate's netconf, built in upstream's order; raises CniError 999 with upstream's words."""
    config = dict(conf.delegate)
    if "type" in config and not isinstance(config["type"], str):
        raise CniError(INTERNAL, "'delegate' dictionary, if present, must have (string) 'type' field")
    for name in ("name", "ipam"):
        if name in config:
            text = f"'delegate' dictionary must not have '{name}' field, it'll be set by flannel"
            raise CniError(INTERNAL, text)
    if conf.runtime_config is not None:
        config["runtimeConfig"] = conf.runtime_config
    config["name"] = conf.name
    config.setdefault("type", "bridge")
    config.setdefault("ipMasq", not env.ipmasq)
    config.setdefault("mtu", env.mtu)
    if config["type"] == "bridge":
        config.setdefault("isGateway", True)
    if conf.version:
        config["cniVersion"] = conf.version
    config["ipam"] = _ipam_config(conf, env)
    return config


def _ipam_config(conf: NetConf, env: subnetenv.SubnetEnv) -> gojson.Object:
    ipam = dict(conf.ipam or {})
    ipam.setdefault("type", "host-local")
    ipam["ranges"] = [[{"subnet": str(subnet)}] for subnet in env.subnets]
    given = ipam.get("routes")
    try:
        if given is not None and not isinstance(given, list):
            raise gojson.GoJsonError(f"routes must be an array, found {gojson.kind(given)}")
        routes = result.parse_routes(given or [])
    except ValueError as exc:
        prefix = "failed to assemble Delegate IPAM: failed to read IPAM routes: failed to parse ipam.routes"
        raise CniError(INTERNAL, f"{prefix}: {exc}") from None
    ipam["routes"] = routes + [{"dst": str(network)} for network in env.networks]
    return ipam


def _encode(config: gojson.Object) -> bytes:
    """Compact and sorted: the bytes that upstream writes to the scratch file and to the delegate."""
    try:
        return gojson.dumps(config).encode()
    except gojson.GoJsonError as exc:
        raise CniError(DECODING_FAILURE, f"the delegate's configuration cannot be written: {exc}") from None


def _saved_config(saved: bytes) -> gojson.Object | None:
    """The content of a scratch file, None if it is broken: no JSON object, or no delegate named in it."""
    try:
        config = gojson.load_object(saved)
    except gojson.GoJsonError:
        return None
    kind = config.get("type")
    return config if isinstance(kind, str) and kind else None


def _version_of(config: gojson.Object) -> str:
    """The version in which a delegate with this configuration answers."""
    value = config.get("cniVersion")
    return value if isinstance(value, str) and value else version.ABSENT


def _convert(made: Made, default_version: str, wanted: str) -> gojson.Object:
    try:
        known = result.parse(made, default_version) if isinstance(made, bytes) else made
        return result.convert(known, wanted)
    except result.ResultError as exc:
        raise CniError(INTERNAL, f"failed to delegate add: {exc}") from None


def _ifnames(host: Host, conf: NetConf, container_id: str) -> list[str]:
    """The interfaces of a container of which upstream left a scratch file, which does not tell them."""
    pairs = reservations(host.files, conf.store)
    return sorted({ifname for owner, ifname in pairs if owner == container_id and ifname}) or [_USUAL_IFNAME]
