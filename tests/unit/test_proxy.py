"""Which proxy leads where, by the rules of Go's net/http."""

from __future__ import annotations

import pytest

from flanneld.subnet.proxy import proxy_for

PROXY = "http://proxy:3128"


@pytest.mark.parametrize(
    ("scheme", "environ", "expected"),
    [
        ("https", {}, None),
        ("https", {"HTTPS_PROXY": PROXY}, PROXY),
        ("https", {"https_proxy": PROXY}, PROXY),
        ("https", {"HTTPS_PROXY": "", "https_proxy": PROXY}, PROXY),
        ("https", {"HTTP_PROXY": PROXY}, None),
        ("http", {"HTTP_PROXY": PROXY, "HTTPS_PROXY": "http://other"}, PROXY),
        ("https", {"HTTPS_PROXY": "proxy:3128"}, PROXY),
        ("https", {"HTTPS_PROXY": "https://proxy"}, "https://proxy"),
        ("https", {"ALL_PROXY": PROXY}, None),
    ],
)
def test_variables(scheme: str, environ: dict[str, str], expected: str | None) -> None:
    assert proxy_for(scheme, "kube.example", None, environ) == expected


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.9.9.9", "::1"])
def test_this_host_is_never_reached_through_a_proxy(host: str) -> None:
    assert proxy_for("https", host, 6443, {"HTTPS_PROXY": PROXY}) is None


@pytest.mark.parametrize(
    ("exceptions", "host", "port", "excepted"),
    [
        ("", "kube.example", None, False),
        (",, ,", "kube.example", None, False),
        ("*", "kube.example", None, True),
        ("kube.example", "kube.example", None, True),
        ("KUBE.example", "kube.EXAMPLE", None, True),
        ("example", "kube.example", None, True),
        (".example", "kube.example", None, True),
        ("*.example", "kube.example", None, True),
        (".kube.example", "kube.example", None, False),
        ("be.example", "kube.example", None, False),
        ("kube.example.org", "kube.example", None, False),
        ("other, kube.example ", "kube.example", None, True),
        ("10.96.0.0/12", "10.96.0.1", 443, True),
        ("10.96.0.0/12", "10.112.0.1", 443, False),
        ("10.96.0.1", "10.96.0.1", None, True),
        ("10.96.0.1", "10.96.0.10", None, False),
        ("10.96.0.1:6443", "10.96.0.1", 6443, True),
        ("10.96.0.1:443", "10.96.0.1", None, True),
        ("10.96.0.1:443", "10.96.0.1", 6443, False),
        ("kube.example:80", "kube.example", None, False),
        ("kube.example:443", "kube.example", None, True),
        ("fd00::/8", "fd00::1", None, True),
        ("fd00::1", "fd00::1", None, True),
        ("[fd00::1]:443", "fd00::1", None, True),
        ("[fd00::1]:444", "fd00::1", None, False),
        ("fd00::/8", "10.96.0.1", None, False),
        ("10.0.0.0/8", "kube.example", None, False),
        ("10.0.0.0/99", "10.0.0.1", None, False),
    ],
)
def test_exceptions(exceptions: str, host: str, port: int | None, excepted: bool) -> None:
    found = proxy_for("https", host, port, {"HTTPS_PROXY": PROXY, "NO_PROXY": exceptions})
    assert found == (None if excepted else PROXY)
    assert proxy_for("https", host, port, {"HTTPS_PROXY": PROXY, "no_proxy": exceptions}) == found
