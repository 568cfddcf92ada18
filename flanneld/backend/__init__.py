"""Backends: how packets travel between nodes."""

from __future__ import annotations

from flanneld.backend.protocol import Backend, check_kind
from flanneld.backend.vxlan import VxlanBackend
from flanneld.config import NetConf
from flanneld.iface import ExternalInterface


def build(config: NetConf, external: ExternalInterface, source: str) -> Backend:
    """The backend that net-conf.json names; raises ConfigError for an unknown type or a bad key."""
    check_kind(config.backend_type.lower(), source)
    return VxlanBackend.from_config(config, external, source)
