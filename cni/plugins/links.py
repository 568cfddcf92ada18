"""Small steps with links that the bridge plugin's modules share. Raise CniError 999 and KernelError."""

from __future__ import annotations

import fcntl
import os

from cni.errors import INTERNAL, CniError, KernelError
from cni.net import rtlink
from cni.net.rtlink import AddressState, LinkState

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cni.host import Sysctl
    from cni.net.nlmsg import Request as Message
    from cni.net.nlsocket import Answer, NetlinkSocket
    from cni.spec import gojson

EEXIST, ENODEV = 17, 19


def find(route: NetlinkSocket, name: str) -> LinkState | None:
    """The link of that name, None if there is none."""
    answer = route.request(*rtlink.get_link(name))
    if answer.messages:
        return LinkState(answer.messages[0].body)
    if answer.errno != ENODEV:
        raise CniError(INTERNAL, f'could not lookup "{name}": {answer.reason}')
    return None


def must_find(route: NetlinkSocket, name: str, failed: str) -> LinkState:
    """The link of that name; without it the error begins with `failed`."""
    found = find(route, name)
    if found is None:
        raise CniError(INTERNAL, f"{failed}: Link not found")
    return found


def ports(route: NetlinkSocket, bridge: LinkState) -> list[LinkState]:
    """The ports of a bridge."""
    links = [LinkState(message.body) for message in route.dump(*rtlink.get_links(bridge.ifindex))]
    return [link for link in links if link.master == bridge.ifindex]


def addresses(route: NetlinkSocket, family: int, link: LinkState) -> list[AddressState]:
    """The addresses of a link; `family` is 4, 6 or 0 for both."""
    messages = route.dump(*rtlink.get_addresses(family, link.ifindex))
    found = [AddressState(message.body) for message in messages]
    return [one for one in found if one.ifindex == link.ifindex]


def expect(answer: Answer, failed: str) -> None:
    """Raise CniError whose text begins with `failed`, unless the kernel did what it was asked."""
    if answer.errno:
        raise CniError(INTERNAL, f"{failed}: {answer.reason}")


def carry_out(route: NetlinkSocket, steps: list[Message], texts: list[str]) -> None:
    """Send all steps at once; `texts` say what each of them would fail to do."""
    if steps:
        for answer, text in zip(route.transact(steps), texts, strict=True):
            expect(answer, text)


def try_write(setting: Sysctl, value: str) -> None:
    """Set what an older kernel, or one without IPv6, may lack; upstream goes on then as well."""
    try:
        setting.write(value)
    except OSError:
        return


def ensure(setting: Sysctl, value: str, purpose: str) -> None:
    """Set what is needed to `purpose`."""
    try:
        setting.ensure(value)
    except OSError as exc:
        reason = (exc.strerror or str(exc)).lower()
        raise CniError(INTERNAL, f"failed to {purpose}: {setting.name}={value}: {reason}") from None


def put(setting: Sysctl, value: str, purpose: str) -> None:
    """`ensure` for a setting that mostly has another value."""
    try:
        setting.write(value)
    except OSError:
        ensure(setting, value, purpose)


class NamespaceLock:
    """What one call at a time may do in the host's network namespace. A context manager; raises KernelError.

    The namespace's own file is what is locked: warm and cold path share it whatever else they see.
    """

    __slots__ = ("_descriptor",)

    def __enter__(self) -> None:
        self._descriptor = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        except OSError as exc:
            os.close(self._descriptor)
            raise KernelError(f"cannot lock the network namespace: {exc.strerror}") from None

    def __exit__(self, *_exc: object) -> None:
        os.close(self._descriptor)


def random_mac() -> str:
    """A unicast MAC of the locally administered kind, as the kernel makes them."""
    return _as_mac(os.urandom(6))


def random_port() -> tuple[str, str]:
    """A name for the host's end of a veth pair, as upstream's, and a MAC."""
    raw = os.urandom(10)
    return f"veth{raw[6:].hex()}", _as_mac(raw[:6])


def _as_mac(raw: bytes) -> str:
    return bytes((raw[0] & 0xFE | 0x02, *raw[1:])).hex(":")


def objects(record: gojson.Object, name: str) -> list[gojson.Object]:
    """The objects in a list of a result."""
    found = record.get(name)
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []
