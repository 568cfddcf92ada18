"""Who a token belongs to and what RBAC grants: the rules of flannel's ClusterRole, and an administrator."""

from __future__ import annotations

import base64
import json
import os
import secrets
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from tests.kube.status import forbidden, forbidden_path, unauthorized

FLANNEL = "system:serviceaccount:kube-flannel:flannel"
ADMIN = "kubernetes-admin"

# "verb resource" or "verb resource/subresource": the ClusterRole `flannel` of kube-flannel.yml.
FLANNEL_RULES = frozenset({"get pods", "get nodes", "list nodes", "watch nodes", "patch nodes/status"})


@dataclass(frozen=True, slots=True)
class Call:
    """What a request wants, as an authorizer sees it; `resource` is empty for another path."""

    verb: str
    path: str
    resource: str = ""
    subresource: str = ""
    namespace: str = ""
    name: str = ""

    @property
    def what(self) -> str:
        """`nodes`, `nodes/status`, or the path."""
        if not self.resource:
            return self.path
        return f"{self.resource}/{self.subresource}" if self.subresource else self.resource


class Access:
    """Tokens and rules; tokens are kept as files in `directory`, so that they survive a restart."""

    def __init__(self, service_account: Path, admin: Path) -> None:
        self._lock = threading.Lock()
        self._file = service_account
        self._rules = set(FLANNEL_RULES)
        if not service_account.exists():
            write_secret(service_account, new_token())
        if not admin.exists():
            write_secret(admin, secrets.token_urlsafe(24))
        self._users = {service_account.read_text(): FLANNEL, admin.read_text(): ADMIN}

    def user(self, authorization: str) -> str:
        """The user of an Authorization header; raises ApiFailure (401)."""
        scheme, _, token = authorization.partition(" ")
        with self._lock:
            found = self._users.get(token.strip()) if scheme.lower() == "bearer" else None
        if found is None:
            raise unauthorized()
        return found

    def expire(self, replace: bool) -> None:
        """Refuse flannel's token from now on, and with `replace` put a new one into its file."""
        with self._lock:
            self._users = {token: user for token, user in self._users.items() if user != FLANNEL}
            if replace:
                token = new_token()
                self._users[token] = FLANNEL
                write_secret(self._file, token)

    def set_rule(self, verb: str, resource: str, granted: bool) -> None:
        with self._lock:
            (self._rules.add if granted else self._rules.discard)(f"{verb} {resource}")

    def authorize(self, user: str, call: Call) -> None:
        """Return if `user` may do this; raises ApiFailure (403)."""
        if user == ADMIN:
            return
        if not call.resource:
            public = call.path.startswith(("/api", "/healthz", "/livez", "/readyz", "/version", "/openapi"))
            if not public:
                raise forbidden_path(user, call.verb, call.path)
            return
        with self._lock:
            granted = f"{call.verb} {call.what}" in self._rules
        if not granted:
            raise forbidden(user, call.verb, call.resource, call.subresource, call.name, call.namespace)


def new_token() -> str:
    """A token in the shape of a service account's: three base64 parts, valid for an hour by its own words."""
    now = int(time.time())
    claims = {
        "iss": "https://kubernetes.default.svc.cluster.local",
        "sub": FLANNEL,
        "iat": now,
        "exp": now + 3607,
    }
    parts = [json.dumps({"alg": "RS256", "kid": "1"}).encode(), json.dumps(claims).encode(), os.urandom(256)]
    return ".".join(base64.urlsafe_b64encode(part).decode().rstrip("=") for part in parts)


def write_secret(path: Path, text: str) -> None:
    """Replace a file in one step, readable by its owner only."""
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(text)
    fresh.chmod(0o600)
    fresh.replace(path)
