"""SHA-512 in hexadecimal digits, from which upstream makes names of chains and comments.

Decision: the C half of the standard module. `import hashlib` loads OpenSSL, 3 ms of the plugin's cold start.
"""

from __future__ import annotations

try:
    from _sha512 import sha512  # type: ignore[import-not-found]
except ImportError:  # Python 3.12 and newer
    from _sha2 import sha512  # type: ignore[import-not-found]


def digits(text: str, length: int) -> str:
    """The first `length` digits of the digest of a text in UTF-8."""
    found: str = sha512(text.encode("utf-8", "surrogateescape")).hexdigest()
    return found[:length]
