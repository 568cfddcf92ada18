"""`python -m tests.kube --listen IP:PORT --dir DIR`: serve until SIGTERM."""

from __future__ import annotations

import argparse
import signal
import ssl
import threading
import time
from pathlib import Path
from types import FrameType

from tests.kube.access import Access
from tests.kube.api import SHAPES, Api
from tests.kube.commands import Commands, ControlServer
from tests.kube.server import Server
from tests.kube.store import Store
from tests.kube.tls import make_chain

JOURNAL = "objects.journal"
END_WATCHES_S = 1.0

_KUBECONFIG = """\
apiVersion: v1
kind: Config
clusters:
- name: double
  cluster:
    server: {url}
    certificate-authority: {ca}
users:
- name: {user}
  user:
    tokenFile: {token}
contexts:
- name: double
  context:
    cluster: double
    user: {user}
    namespace: kube-flannel
current-context: double
"""


def main() -> None:
    """Make certificates, tokens and kubeconfigs in DIR as far as they are missing, then serve."""
    options = _options()
    directory: Path = options.dir
    account = directory / "serviceaccount"
    account.mkdir(parents=True, exist_ok=True)
    address, port = _address(options.listen)
    chains = [make_chain(directory, prefix, address) for prefix in ("", "wrong-")]
    ca = chains[0][0]
    (account / "ca.crt").write_bytes(ca.read_bytes())
    (account / "namespace").write_text("kube-flannel")
    tokens = {"flannel": account / "token", "admin": directory / "admin.token"}
    access = Access(tokens["flannel"], tokens["admin"])
    store = Store(SHAPES, directory / JOURNAL, options.window)
    wrong, right = _context(chains[1]), _context(chains[0])
    server = Server((address, port), (right, wrong), Api(store, access), options.bookmark_s)
    shown = f"[{address}]" if ":" in address else address
    url = f"https://{shown}:{server.port}"
    for user, token in tokens.items():
        name = "kubeconfig" if user == "flannel" else f"{user}.kubeconfig"
        (directory / name).write_text(_KUBECONFIG.format(url=url, ca=ca, user=user, token=token))
    (directory / "url").write_text(url)
    signal.signal(signal.SIGTERM, _terminate)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 3600}, daemon=True).start()
    ControlServer(directory, Commands(server))
    print(f"serving on {url}", flush=True)
    try:
        signal.pause()
    finally:
        _end_watches(server)


def _end_watches(server: Server) -> None:
    """Take no more requests and end the watches in order, as upstream does on SIGTERM."""
    store = server.api.store
    server.stopping = True
    server.socket.close()
    store.end_watches()
    limit = time.monotonic() + END_WATCHES_S
    while store.watchers() and time.monotonic() < limit:
        time.sleep(0.005)


def _terminate(_number: int, _frame: FrameType | None) -> None:
    raise SystemExit(0)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.kube", description=__doc__)
    parser.add_argument("--listen", required=True, metavar="IP:PORT", help="port 0 takes a free one")
    parser.add_argument(
        "--dir", required=True, type=lambda text: Path(text).resolve(), help="state and credentials"
    )
    parser.add_argument("--bookmark-s", type=float, default=60.0, help="seconds between bookmarks")
    parser.add_argument("--window", type=int, default=10_000, help="events that history holds")
    return parser.parse_args()


def _address(listen: str) -> tuple[str, int]:
    host, _, port = listen.rpartition(":")
    return host.strip("[]"), int(port)


def _context(chain: tuple[Path, Path, Path]) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain[1], chain[2])
    context.set_alpn_protocols(["http/1.1"])
    return context


if __name__ == "__main__":
    main()
