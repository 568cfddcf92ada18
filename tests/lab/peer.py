"""Both ends of the lab's TCP connections; a script without imports of ours, run inside a namespace.

answer PORT NAME          tell each client NAME and the client's address as seen here, for ever
ask ADDRESS PORT          print what an answering server says
sink PORT                 take one stream; print its bytes and seconds
pour ADDRESS PORT BYTES   send one stream to a sink
"""

import contextlib
import json
import socket
import sys
import time

TIMEOUT_S = 5.0
CHUNK_BYTES = 1 << 18


def listen(port: int) -> socket.socket:
    """A server of both families; an IPv4 client shows as ::ffff:A.B.C.D."""
    return socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)


def answer(port: int, name: str) -> None:
    """Serve for ever; one JSON line to each client."""
    with listen(port) as server:
        print("listening", flush=True)
        while True:
            client, (address, *_) = server.accept()
            said = {"name": name, "peer": address.removeprefix("::ffff:")}
            with client, contextlib.suppress(ConnectionError):  # a client that left is no reason to end
                client.sendall(json.dumps(said).encode() + b"\n")


def ask(address: str, port: int) -> None:
    """Print the server's line."""
    with socket.create_connection((address, port), TIMEOUT_S) as connection, connection.makefile() as stream:
        print(stream.read(), end="")


def sink(port: int) -> None:
    """Count one stream to its end; the clock runs from the first byte."""
    with listen(port) as server:
        server.settimeout(TIMEOUT_S)
        print("listening", flush=True)
        client, _ = server.accept()
        buffer = bytearray(CHUNK_BYTES)
        with client:
            count = client.recv_into(buffer)
            begin = time.monotonic()
            while more := client.recv_into(buffer):
                count += more
    print(json.dumps({"bytes": count, "seconds": time.monotonic() - begin}))


def pour(address: str, port: int, size: int) -> None:
    """Send `size` zero bytes and wait until the other side has read them all."""
    chunk = bytes(CHUNK_BYTES)
    with socket.create_connection((address, port), TIMEOUT_S) as connection:
        for offset in range(0, size, CHUNK_BYTES):
            connection.sendall(chunk[: size - offset])
        connection.shutdown(socket.SHUT_WR)
        connection.recv(1)


def main(verb: str, *words: str) -> None:
    """Run one of the verbs above."""
    match verb, words:
        case "answer", (port, name):
            answer(int(port), name)
        case "ask", (address, port):
            ask(address, int(port))
        case "sink", (port,):
            sink(int(port))
        case "pour", (address, port, size):
            pour(address, int(port), int(size))
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except OSError as exc:
        raise SystemExit(f"{' '.join(sys.argv[1:])}: {exc}") from exc
