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

Source: CNI 1.1.0, "Section 4: Plugin Delegation"; upstream flannel-io/cni-plugin.
"""

from __future__ import annotations

import os

from cni import __version__
from cni.errors import (
    DECODING_FAILURE,
    INCOMPATIBLE_VERSION,
    INTERNAL,
    INVALID_ENVIRONMENT,
    NOT_AVAILABLE,
    CniError,
)
from cni.plugins import delegate, subnetenv
from cni.plugins.scratch import Scratch, reservations
from cni.spec import gojson, result, version
from cni.spec.address import parse_cidr
from cni.spec.netconf import VALID_ATTACHMENTS, NetConf

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from cni.spec.request import Request

# host-local's DEL finds reservations by their content, but wants some valid range: TEST-NET-1 of RFC 5737.
_ANY_SUBNET = "192.0.2.0/24"
_USUAL_IFNAME = "eth0"
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "i686": "386"}


class Flannel:
    """The plugin. `note` takes lines for the runtime's log; `run` executes a delegate."""

    __slots__ = ("_note", "_run")

    def __init__(
        self,
        note: Callable[[str], None],
        run: Callable[[str, Mapping[str, str], bytes], delegate.Outcome] = delegate.run,
    ) -> None:
        self._note = note
        self._run = run

    @property
    def about(self) -> str:
        machine = os.uname().machine
        return f"CNI Plugin flannel version {__version__} (linux/{_ARCHITECTURES.get(machine, machine)})"

    def owns_netns(self, path: str) -> bool:
        """Whether `path` is the namespace that this thread runs in; False if it cannot be told."""
        try:
            theirs, ours = os.stat(path), os.stat("/proc/thread-self/ns/net")
        except OSError:
            return False
        return (theirs.st_dev, theirs.st_ino) == (ours.st_dev, ours.st_ino)

    def add(self, request: Request) -> gojson.Object:
        """Attach, and return the result in the requested version; undone if it fails. Raises CniError."""
        conf = _netconf(request, "failed to load flannel netconf file: ")
        config = delegate_config(conf, subnetenv.load(conf.subnet_file))
        self._find(request, config)
        scratch = Scratch(conf.data_dir)
        existed = scratch.load(request.container_id, request.ifname) is not None
        try:
            used, stdout = self._add(request, config, None if existed else scratch)
            made = _convert(stdout, _version_of(used), conf.version or version.ABSENT)
        except CniError as exc:
            # An ADD of what is already attached fails, and undoing it would tear down a live interface.
            if not existed and not _was_there(exc):
                self._undo(request, scratch)
            raise
        if existed:
            scratch.save(request.container_id, request.ifname, _encode(used))
        return made

    def delete(self, request: Request) -> None:
        """Detach; a repeated DEL succeeds. Raises CniError, and then keeps the scratch file for a retry."""
        conf = _netconf(request)
        scratch = Scratch(conf.data_dir)
        saved = scratch.load(request.container_id, request.ifname)
        if saved is None:
            self._sweep(request, conf)
            return
        self._detach(request, conf, saved)
        scratch.remove(request.container_id, request.ifname)

    def check(self, request: Request) -> None:
        """Have the delegate check the attachment against prevResult. Raises CniError."""
        conf = _netconf(request)
        saved = Scratch(conf.data_dir).load(request.container_id, request.ifname)
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
        conf = _netconf(request)
        try:
            env = subnetenv.load(conf.subnet_file)
        except CniError as exc:
            raise CniError(NOT_AVAILABLE, exc.msg) from None
        try:
            self._if_known(request, "STATUS", delegate_config(conf, env))
        except delegate.DelegateMissing as exc:
            raise CniError(NOT_AVAILABLE, f"{exc.msg}: install it in a directory of CNI_PATH") from None

    def gc(self, request: Request) -> None:
        """Detach what the runtime no longer knows, then the delegate's GC; failures are raised at the end."""
        conf = _netconf(request)
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
        self, request: Request, config: gojson.Object, scratch: Scratch | None
    ) -> tuple[gojson.Object, bytes]:
        """Run the delegate's ADD, saving its configuration first if `scratch` is given; (used, stdout)."""

        def attempt(config: gojson.Object) -> tuple[gojson.Object, bytes]:
            data = _encode(config)
            if scratch is not None:
                scratch.save(request.container_id, request.ifname, data)
            return config, self._delegate(request, "ADD", config, data)

        try:
            return attempt(config)
        except delegate.DelegateRefused as exc:
            return attempt(self._lowered(request, config, exc))

    def _undo(self, request: Request, scratch: Scratch) -> None:
        """Take back a failed ADD; if the delegate cannot, the scratch file stays for the runtime's DEL."""
        try:
            saved = scratch.load(request.container_id, request.ifname)
            config = None if saved is None else _saved_config(saved)
            if saved is not None and config is not None:
                self._delegate(request, "DEL", config, saved)
                scratch.remove(request.container_id, request.ifname)
        except CniError as exc:
            self._note(f"flannel: undoing the failed ADD failed too, DEL will do it: {exc}")

    def _detach(self, request: Request, conf: NetConf, saved: bytes) -> None:
        """Run the delegate's DEL with the saved bytes, or with a rebuilt configuration if they are broken."""
        config = _saved_config(saved)
        if config is None:
            attachment = f"{request.container_id} {request.ifname}"
            self._note(f"flannel: the scratch file of {attachment} is broken, using stdin and subnet.env")
            config = self._rebuilt(conf)
            saved = _encode(config)
        try:
            self._delegate(request, "DEL", config, saved)
        except delegate.DelegateRefused as exc:
            lowered = self._lowered(request, config, exc)
            self._delegate(request, "DEL", lowered, _encode(lowered))

    def _sweep(self, request: Request, conf: NetConf) -> None:
        """DEL without a scratch file: nothing to do, unless host-local still holds the attachment's address.

        Best effort: what fails is noted, and the DEL succeeds as upstream's does.
        """
        attachment = (request.container_id, request.ifname)
        held = {attachment, (request.container_id, "")}.intersection(reservations(conf.store))
        if not held:
            return
        self._note(f"flannel: no scratch file of {' '.join(attachment)}, but an address in {conf.store}")
        try:
            self._detach(request, conf, _encode(self._rebuilt(conf)))
        except CniError as exc:
            self._note(f"flannel: releasing it failed: {exc}")

    def _collect(self, request: Request, conf: NetConf, valid: frozenset[tuple[str, str]]) -> list[str]:
        """Detach every attachment of this network that is not in `valid`; returns what failed."""
        scratch = Scratch(conf.data_dir)
        live_containers = {container_id for container_id, _ in valid}
        failures = []
        for container_id, ifname, saved in scratch.saved():
            config = _saved_config(saved)
            live = (container_id, ifname) in valid if ifname else container_id in live_containers
            if live or config is None or config.get("name") != conf.name:
                continue
            try:
                for name in [ifname] if ifname else _ifnames(conf, container_id):
                    self._detach(request.for_attachment("DEL", container_id, name), conf, saved)
                scratch.remove(container_id, ifname)
            except CniError as exc:
                failures.append(f"DEL of {container_id} {ifname}: {exc}")
        return failures

    def _rebuilt(self, conf: NetConf) -> gojson.Object:
        """The delegate's configuration from stdin and subnet.env; without the file, enough of it for DEL."""
        try:
            env = subnetenv.load(conf.subnet_file)
        except CniError as exc:
            self._note(f"flannel: going on without subnet.env: {exc}")
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
            record = gojson.load_object(self._delegate(request, "VERSION", config, _encode(question)))
            offered: list[object] = gojson.typed(record, "supportedVersions", list, [])
        except (CniError, gojson.GoJsonError) as exc:
            self._note(f"flannel: the delegate did not tell its versions: {exc}")
            return []
        return [one for one in offered if isinstance(one, str)]

    def _find(self, request: Request, config: gojson.Object, command: str = "ADD") -> str:
        try:
            return delegate.find(str(config["type"]), request.path)
        except CniError as exc:
            raise type(exc)(exc.code, f"failed to delegate {command.lower()}: {exc.msg}") from None

    def _delegate(self, request: Request, command: str, config: gojson.Object, stdin: bytes) -> bytes:
        """Run the delegate that `config` names, and return its stdout; raises CniError."""
        path = self._find(request, config, command)
        try:
            outcome = self._run(path, {**request.environment, "CNI_COMMAND": command}, stdin)
        except OSError as exc:
            reason = (exc.strerror or str(exc)).lower()
            text = f"failed to delegate {command.lower()}: netplugin failed: cannot execute {path}: {reason}"
            raise CniError(INTERNAL, text) from None
        if outcome.stderr:
            self._note(outcome.stderr.decode("utf-8", "replace").rstrip("\n"))
        return delegate.answer(str(config["type"]), path, outcome)


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


def _netconf(request: Request, prefix: str = "") -> NetConf:
    try:
        return NetConf(request.config)
    except gojson.GoJsonError as exc:
        raise CniError(INTERNAL, f"{prefix}failed to load netconf: json: {exc}") from None


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


def _convert(stdout: bytes, default_version: str, wanted: str) -> gojson.Object:
    try:
        return result.convert(result.parse(stdout, default_version), wanted)
    except result.ResultError as exc:
        raise CniError(INTERNAL, f"failed to delegate add: {exc}") from None


def _ifnames(conf: NetConf, container_id: str) -> list[str]:
    """The interfaces of a container of which upstream left a scratch file, which does not tell them."""
    held = {ifname for owner, ifname in reservations(conf.store) if owner == container_id and ifname}
    return sorted(held) or [_USUAL_IFNAME]
