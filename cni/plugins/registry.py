"""Which plugin answers under which name. Each is imported when it is asked for."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from cni.handler import Plugin
    from cni.host import Host

NAMES = ("flannel", "bridge", "host-local", "portmap", "loopback")


def find(name: str) -> Callable[[Host], Plugin] | None:
    """The plugin of that name, to be made for each call; None if there is none."""
    # Import statements, because what freezes the program finds those.
    match name:
        case "flannel":
            from cni.plugins.flannel import Flannel

            return Flannel
        case "bridge":
            from cni.plugins.bridge import Bridge

            return Bridge
        case "host-local":
            from cni.plugins.hostlocal import HostLocal

            return HostLocal
        case "portmap":
            from cni.plugins.portmap import Portmap

            return Portmap
        case "loopback":
            from cni.plugins.loopback import Loopback

            return Loopback
    return None
