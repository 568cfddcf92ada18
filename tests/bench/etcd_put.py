"""Write peers to etcd: `KEY VALUE` a line of FILE, in transactions of 100.

Prints when the last request was sent (monotonic seconds), connection and imports done.
Usage: etcd_put.py HOST PORT FILE
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import grpc
from etcd3.etcdrpc import rpc_pb2, rpc_pb2_grpc

BATCH = 100  # etcd takes 128 operations in one transaction


def main() -> None:
    """Connect, then write."""
    host, port, file = sys.argv[1:]
    stub = rpc_pb2_grpc.KVStub(grpc.insecure_channel(f"{host}:{port}"))
    stub.Range(rpc_pb2.RangeRequest(key=b"x"), timeout=5)
    puts = [
        rpc_pb2.RequestOp(request_put=rpc_pb2.PutRequest(key=key.encode(), value=value.encode()))
        for key, _, value in (
            line.rstrip("\n").partition(" ") for line in Path(file).read_text().splitlines()
        )
    ]
    began = 0.0
    for start in range(0, len(puts), BATCH):
        request = rpc_pb2.TxnRequest(success=puts[start : start + BATCH])
        began = time.monotonic()
        stub.Txn(request, timeout=10)
    print(f"{began:.6f}")


if __name__ == "__main__":
    main()
