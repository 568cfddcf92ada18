"""Backends: how packets travel between nodes."""

from __future__ import annotations

from flanneld.backend.protocol import Backend, check_kind
from flanneld.backend.vxlan import OnLink, VxlanBackend, never
from flanneld.config import NetConf
from flanneld.iface import ExternalInterface


def build(
    config: NetConf,
    external: ExternalInterface,
    source: str,
    *,
    on_link: OnLink = never,
    release: str = "",
) -> Backend:
    """The backend that net-conf.json names; raises ConfigError for an unknown type or a bad key.

    `on_link` tells which addresses the host reaches over the external interface without a gateway
    (`NetlinkKernel.on_link`), and `release` is the kernel's (`os.uname().release`).
    """
    check_kind(config.backend_type.lower(), source)
    return VxlanBackend.from_config(config, external, source, on_link=on_link, release=release)
