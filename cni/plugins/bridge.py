"""The bridge plugin: a veth pair between the container and a bridge of the host.

Keys, results, errors and the state left in the kernel are those of upstream's `bridge`, so that each can
check and tear down what the other has set up. What differs is the way there: few messages to the kernel, no
process, no waiting. And what upstream loses is not lost: a failed ADD leaves nothing behind, DEL releases
the address and the rules whatever else fails, CHECK and GC and STATUS do what they are for.

Source: containernetworking/plugins, plugins/main/bridge; CNI 1.1.0.
"""

from __future__ import annotations

import os

from cni.errors import INTERNAL, INVALID_ENVIRONMENT, CniError, KernelError
from cni.host import NetnsInvalid, NetnsMissing
from cni.net import rtlink
from cni.plugins.about import about
from cni.plugins.bridgeadd import Attachment
from cni.plugins.bridgeconf import ARGUMENTS, BridgeConf, bridge_conf
from cni.plugins.ipam import Ipam
from cni.plugins.links import ENODEV, find
from cni.plugins.links import addresses as addresses_of
from cni.spec import args, gojson, result

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from cni.host import Host
    from cni.net.rtlink import LinkState
    from cni.spec.address import Cidr
    from cni.spec.request import Request


class Bridge:
    """The plugin, for one call."""

    __slots__ = ("_host",)

    def __init__(self, host: Host) -> None:
        self._host = host

    @property
    def about(self) -> str:
        return about("bridge")

    def owns_netns(self, path: str) -> bool:
        """Whether `path` is the namespace that the runtime itself runs in."""
        return self._host.shares_netns(path)

    def add(self, request: Request) -> gojson.Object:
        """Attach the container; undone if it fails. Raises CniError, and Declined before anything is done."""
        cni_args = args.relevant(request.environment.get("CNI_ARGS", ""), ARGUMENTS)
        conf = self._host.known(bridge_conf, request.stdin, cni_args)
        if "%" in request.ifname:  # the kernel puts a number for %d, and DEL would look for another name
            raise CniError(INVALID_ENVIRONMENT, "interface name contains %", request.ifname)
        wanted = request.version
        attachment = Attachment(self._host, request, conf)
        try:
            made = attachment.make()
            return result.convert(made, wanted)
        except (result.ResultError, KernelError) as exc:
            attachment.undo()
            raise CniError(INTERNAL, str(exc)) from None
        except BaseException:
            attachment.undo()
            raise

    def delete(self, request: Request) -> None:
        """Detach: link, address, rules. All is tried, and the first failure raised as CniError."""
        conf = BridgeConf(request)
        failures: list[CniError] = []
        ipam = self._ipam_for_delete(request, conf, failures)
        addresses: list[Cidr] = []
        _try(failures, lambda: self._unplug(request, conf, addresses))
        if ipam is not None:
            _try(failures, ipam.delete)
        if conf.mac_spoof_check:
            from cni.plugins import macspoof

            _try(failures, lambda: macspoof.remove(self._host, request.container_id, request.ifname))
        if conf.ipam_type:
            _try(failures, lambda: self._stop_masquerading(request, conf, addresses))
        # The kernel has let go of its lock for links by then.
        self._host.afterwards(lambda: self._forget_neighbours(conf, addresses))
        if failures:
            raise failures[0]

    def _ipam_for_delete(self, request: Request, conf: BridgeConf, failures: list[CniError]) -> Ipam | None:
        """The IPAM plugin; one that is missing does not keep the link. Raises Declined."""
        try:
            return Ipam(self._host, conf.ipam_type, request) if conf.ipam_type else None
        except CniError as exc:
            failures.append(exc)
            return None

    def check(self, request: Request) -> None:
        """Compare prevResult and netconf with what is there; raises CniError naming what differs."""
        conf = BridgeConf(request)
        netns = self._host.netns(request.netns)
        if not conf.ipam_type:
            raise CniError(INTERNAL, "no plugin name provided")
        Ipam(self._host, conf.ipam_type, request).check()
        from cni.plugins import bridgecheck

        try:
            bridgecheck.check(self._host, netns, request, conf)
        except KernelError as exc:
            raise CniError(INTERNAL, str(exc)) from None

    def status(self, request: Request) -> None:
        """Whether ADD could work: the netconf makes sense, and so says the IPAM plugin. Raises CniError."""
        conf = BridgeConf(request)
        conf.check_for_add()
        if conf.ipam_type:
            Ipam(self._host, conf.ipam_type, request).status()

    def gc(self, request: Request) -> None:
        """Release the addresses and the rules of attachments that the runtime no longer knows."""
        conf = BridgeConf(request)
        if conf.ipam_type:
            Ipam(self._host, conf.ipam_type, request).gc()
        from cni.plugins import macspoof, masq

        masq.sweep(self._host, self._is_there)
        macspoof.sweep(self._host, self._is_there)

    def _is_there(self, link: str) -> bool:
        return find(self._host.route, link) is not None

    def _stop_masquerading(self, request: Request, conf: BridgeConf, addresses: list[Cidr]) -> None:
        """Whatever the netconf says now: rules of an address that is used again would hit another pod."""
        from cni.plugins import masq

        container_id, ifname = request.container_id, request.ifname
        masq.remove(self._host, conf.name, container_id, ifname, addresses or None)

    def _forget_neighbours(self, conf: BridgeConf, addresses: list[Cidr]) -> None:
        """What the host knows of the addresses is wrong from now on."""
        if not addresses:
            return
        known = self._host.bridges.get(conf.bridge)
        bridge = known.link if known is not None else find(self._host.route, conf.bridge)
        if bridge is not None:
            self._host.route.transact([rtlink.drop_neighbour(bridge.ifindex, cidr) for cidr in addresses])

    def _unplug(self, request: Request, conf: BridgeConf, addresses: list[Cidr]) -> None:
        """Delete the container's link; where its namespace is gone, what may be left of it on the host.

        `addresses` takes those that the link had.
        """
        try:
            netns = self._host.netns(request.netns)
        except (NetnsMissing, NetnsInvalid) as exc:
            if request.netns and isinstance(exc, NetnsInvalid) and not exc.is_gone:
                raise
            self._unplug_from_host(conf)
            return
        link = find(netns.route, request.ifname)
        if link is None:
            return
        if self._is_somebody_elses(link, request, conf):
            self._host.note(
                f"bridge: {request.ifname} in {request.netns} is another attachment's, left alone"
            )
            return
        addresses += [one.cidr for one in addresses_of(netns.route, 0, link) if not one.is_link_local]
        number = self._host.delete_link(netns.route, request.ifname)
        if number not in (0, ENODEV):
            reason = os.strerror(number).lower()
            raise CniError(INTERNAL, f"failed to delete {gojson.dumps(request.ifname)}: {reason}")

    def _is_somebody_elses(self, link: LinkState, request: Request, conf: BridgeConf) -> bool:
        """Whether prevResult knows neither this MAC nor this link's other end.

        Paths as /proc/PID/ns/net are used again. A MAC alone tells little: a pod may have changed it.
        """
        wanted = result.interface(conf.prev_result, request.ifname, request.netns)
        if wanted is None or wanted.get("mac") in (None, "", link.mac):
            return False
        answer = self._host.route.request(*rtlink.get_link(ifindex=link.peer))
        end = rtlink.LinkState(answer.messages[0].body) if answer.messages else None
        known = [(one.get("name"), one.get("mac")) for one in result.interfaces(conf.prev_result)]
        return end is None or (end.name, end.mac) not in known

    def _unplug_from_host(self, conf: BridgeConf) -> None:
        """Delete the host end, if prevResult tells which it is: a namespace without a path may live on."""
        for one in result.interfaces(conf.prev_result):
            name, mac = one.get("name"), one.get("mac")
            if one.get("sandbox") or not isinstance(name, str) or not name.startswith("veth") or not mac:
                continue
            link = find(self._host.route, name)
            if link is not None and link.kind == "veth" and link.mac == mac:
                self._host.delete_link(self._host.route, name)


def _try(failures: list[CniError], step: Callable[[], None]) -> None:
    try:
        step()
    except CniError as exc:
        failures.append(exc)
    except KernelError as exc:
        failures.append(CniError(INTERNAL, str(exc)))
