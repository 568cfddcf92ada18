"""A kubeconfig that says more than we can do is refused, rather than done otherwise than it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cni.errors import ConfigError
from flanneld.subnet.kubeapi import Access


def kubeconfig(path: Path, cluster: dict[str, str], user: dict[str, str]) -> Access:
    config = {
        "clusters": [{"name": "c", "cluster": {"server": "https://192.0.2.1:6443", **cluster}}],
        "users": [{"name": "other", "user": {"as": "nobody"}}, {"name": "u", "user": {"token": "t", **user}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    }
    (path / "config").write_text(json.dumps(config))
    return Access("", str(path / "config"), {})


def test_what_is_supported_is_taken(tmp_path: Path) -> None:
    client = kubeconfig(tmp_path, {}, {}).connect()
    assert client.cluster.server == "https://192.0.2.1:6443"


@pytest.mark.parametrize("key", ["as", "as-groups", "tls-server-name", "proxy-url"])
def test_what_is_not_is_named(tmp_path: Path, key: str) -> None:
    of_user = key.startswith("as")
    access = kubeconfig(tmp_path, {} if of_user else {key: "x"}, {key: "x"} if of_user else {})
    with pytest.raises(
        ConfigError, match=rf"{key} of {'user u' if of_user else 'cluster c'} is not supported"
    ):
        access.connect()
