"""Certificate authorities and server certificates for one address, made by the `openssl` program."""

from __future__ import annotations

import subprocess
from pathlib import Path

_DAYS = "3650"

_CONFIG = """
[req]
distinguished_name = name
prompt = no
[name]
CN = {common_name}
[ca]
basicConstraints = critical,CA:TRUE
keyUsage = critical,keyCertSign,digitalSignature,keyEncipherment
subjectKeyIdentifier = hash
[server]
basicConstraints = critical,CA:FALSE
keyUsage = critical,digitalSignature,keyEncipherment
extendedKeyUsage = serverAuth
authorityKeyIdentifier = keyid
subjectAltName = DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc,\
DNS:kubernetes.default.svc.cluster.local,DNS:localhost,IP:{address}
"""


def make_chain(directory: Path, prefix: str, address: str) -> tuple[Path, Path, Path]:
    """Make (or find) CA certificate, server certificate and server key in `directory`.

    `address` is the IP address that the certificate names. Raises RuntimeError with openssl's words.
    """
    ca, ca_key = directory / f"{prefix}ca.crt", directory / f"{prefix}ca.key"
    cert, key = directory / f"{prefix}server.crt", directory / f"{prefix}server.key"
    if key.exists():
        return ca, cert, key
    config = directory / "openssl.cnf"
    config.write_text(_CONFIG.format(common_name="kubernetes", address=address))
    new_key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    request = directory / "server.csr"
    _openssl("req", "-x509", *new_key, "-config", config, "-extensions", "ca", "-days", _DAYS,
             "-keyout", ca_key, "-out", ca)  # fmt: skip
    config.write_text(_CONFIG.format(common_name="kube-apiserver", address=address))
    _openssl("req", *new_key, "-config", config, "-keyout", key.with_suffix(".tmp"), "-out", request)
    _openssl("x509", "-req", "-in", request, "-CA", ca, "-CAkey", ca_key, "-CAcreateserial",
             "-extfile", config, "-extensions", "server", "-days", _DAYS, "-out", cert)  # fmt: skip
    key.with_suffix(".tmp").replace(key)
    return ca, cert, key


def _openssl(*words: str | Path) -> None:
    done = subprocess.run(["openssl", *map(str, words)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"openssl {words[0]}: {done.stderr.strip()}")
