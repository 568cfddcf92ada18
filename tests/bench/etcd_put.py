"""Write one key to etcd and print when: `MONOTONIC_SECONDS` of the request, connection and imports done.

Usage: etcd_put.py HOST PORT KEY VALUE
"""

from __future__ import annotations

import sys
import time

import grpc
from etcd3.etcdrpc import rpc_pb2, rpc_pb2_grpc


def main() -> None:
    """Connect, then write."""
    host, port, key, value = sys.argv[1:]
    stub = rpc_pb2_grpc.KVStub(grpc.insecure_channel(f"{host}:{port}"))
    stub.Range(rpc_pb2.RangeRequest(key=key.encode()), timeout=5)
    began = time.monotonic()
    stub.Put(rpc_pb2.PutRequest(key=key.encode(), value=value.encode()), timeout=5)
    print(f"{began:.6f}")


if __name__ == "__main__":
    main()
