"""The answers that say no: `Status` objects with the codes, reasons and texts of kube-apiserver.

Texts after `k8s.io/apimachinery/pkg/api/errors` and `k8s.io/apiserver`, releases 1.30 to 1.34.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Json = dict[str, Any]

PATCH_TYPES = (
    "application/json-patch+json",
    "application/merge-patch+json",
    "application/strategic-merge-patch+json",
    "application/apply-patch+yaml",
)

_CONTINUE_EXPIRED = (
    "The provided continue parameter is too old to display a consistent list result. You can start a new "
    "list without the continue parameter, or use the continue token in this response to retrieve the "
    "remainder of the results. Continuing with the provided token results in an inconsistent list - objects "
    "that were created, modified, or deleted between the time the first chunk was returned and now may show "
    "up in the list."
)


class ApiFailure(Exception):
    """A request that ends with a `Status`; `headers` go with it, `plain` replaces the object's bytes."""

    def __init__(self, status: Json, headers: Mapping[str, str] | None = None, plain: str = "") -> None:
        super().__init__(status["message"])
        self.status = status
        self.headers = dict(headers or {})
        self.plain = plain

    @property
    def code(self) -> int:
        return int(self.status["code"])


def failure(
    code: int, reason: str, message: str, details: Json | None = None, metadata: Json | None = None
) -> ApiFailure:
    """A failure in the field order of the real object; an unknown `reason` is empty and left out."""
    status: Json = {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": metadata or {},
        "status": "Failure",
        "message": message,
    }
    if reason:
        status["reason"] = reason
    if details is not None:
        status["details"] = details
    status["code"] = code
    headers = {}
    if details and "retryAfterSeconds" in details:
        headers["Retry-After"] = str(details["retryAfterSeconds"])
    return ApiFailure(status, headers)


def success(resource: str, name: str, uid: str) -> Json:
    """The answer to a DELETE that is done at once."""
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Success",
        "details": {"name": name, "kind": resource, "uid": uid},
    }


def unauthorized() -> ApiFailure:
    return failure(401, "Unauthorized", "Unauthorized")


def forbidden(user: str, verb: str, resource: str, subresource: str, name: str, namespace: str) -> ApiFailure:
    """RBAC grants this verb to nobody of this name; `resource` without its subresource."""
    full = f"{resource}/{subresource}" if subresource else resource
    where = f'in the namespace "{namespace}"' if namespace else "at the cluster scope"
    what = f'{resource} "{name}"' if name else resource
    message = f'{what} is forbidden: User "{user}" cannot {verb} resource "{full}" in API group "" {where}'
    details = {"name": name, "kind": resource} if name else {"kind": resource}
    return failure(403, "Forbidden", message, details)


def forbidden_path(user: str, verb: str, path: str) -> ApiFailure:
    return failure(403, "Forbidden", f'forbidden: User "{user}" cannot {verb} path "{path}"', {})


def not_found(resource: str, name: str) -> ApiFailure:
    return failure(404, "NotFound", f'{resource} "{name}" not found', {"name": name, "kind": resource})


def no_such_path() -> ApiFailure:
    """A path below /api/v1 that is no resource."""
    return failure(404, "NotFound", "the server could not find the requested resource", {})


def no_such_page() -> ApiFailure:
    """Any other unknown path: plain text."""
    refused = failure(404, "NotFound", "404 page not found")
    refused.plain = "404 page not found\n"
    return refused


def method_not_allowed() -> ApiFailure:
    message = "the server does not allow this method on the requested resource"
    return failure(405, "MethodNotAllowed", message, {})


def already_exists(resource: str, name: str) -> ApiFailure:
    return failure(
        409, "AlreadyExists", f'{resource} "{name}" already exists', {"name": name, "kind": resource}
    )


def conflict(resource: str, name: str, why: str) -> ApiFailure:
    message = f'Operation cannot be fulfilled on {resource} "{name}": {why}'
    return failure(409, "Conflict", message, {"name": name, "kind": resource})


def modified(resource: str, name: str) -> ApiFailure:
    why = "the object has been modified; please apply your changes to the latest version and try again"
    return conflict(resource, name, why)


def bad_request(message: str) -> ApiFailure:
    return failure(400, "BadRequest", message)


def unsupported_media_type(accepted: Sequence[str]) -> ApiFailure:
    message = "the body of the request was in an unknown format - accepted media types include: " + ", ".join(
        accepted
    )
    return failure(415, "UnsupportedMediaType", message)


def not_acceptable() -> ApiFailure:
    return failure(406, "NotAcceptable", "only the following media types are accepted: application/json")


def invalid(kind: str, name: str, causes: Sequence[tuple[str, str, str]], group: str = "") -> ApiFailure:
    """Refused by validation; each cause is (field, cause type such as FieldValueForbidden, text)."""
    texts = [f"{field}: {text}" for field, _, text in causes]
    joined = texts[0] if len(texts) == 1 else f"[{', '.join(texts)}]"
    details: Json = {"name": name, "group": group, "kind": kind}
    details = {key: value for key, value in details.items() if value}
    details["causes"] = [{"reason": why, "message": text, "field": field} for field, why, text in causes]
    full = f"{kind}.{group}" if group else kind
    return failure(422, "Invalid", f'{full} "{name}" is invalid: {joined}', details)


def undecodable_patch(shown: str, why: str) -> ApiFailure:
    """A patch whose result is no object of the kind: the kind's name is empty here, as upstream's is."""
    return invalid("", "", [("patch", "FieldValueInvalid", f"Invalid value: {go_quote(shown)}: {why}")])


def watch_expired(requested: int, oldest: int) -> ApiFailure:
    return failure(410, "Expired", f"too old resource version: {requested} ({oldest})")


def list_expired() -> ApiFailure:
    return failure(410, "Expired", "The resourceVersion for the provided list is too old.")


def continue_expired(next_token: str) -> ApiFailure:
    return failure(410, "Expired", _CONTINUE_EXPIRED, metadata={"continue": next_token})


def too_large_version(requested: int, current: int) -> ApiFailure:
    details = {
        "causes": [{"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}],
        "retryAfterSeconds": 1,
    }
    message = f"Timeout: Too large resource version: {requested}, current: {current}"
    return failure(504, "Timeout", message, details)


def too_many_requests(retry_after_s: int, plain: bool) -> ApiFailure:
    """429 by a handler that is not ready, or (`plain`) by priority and fairness: text, not a Status."""
    refused = failure(
        429, "TooManyRequests", "storage is (re)initializing", {"retryAfterSeconds": retry_after_s}
    )
    if plain:
        refused.plain = "Too many requests, please try again later.\n"
    return refused


def server_error(code: int) -> ApiFailure:
    """What a client sees while etcd is in trouble (500), the server starts (503) or times out (504)."""
    known = {
        500: ("", "etcdserver: leader changed"),
        503: ("ServiceUnavailable", "apiserver is shutting down"),
        504: ("Timeout", "Timeout: request did not complete within the allotted timeout"),
    }
    if code not in known:
        raise ValueError(f"server error {code}: must be one of {sorted(known)}")
    reason, message = known[code]
    return failure(code, reason, message, {} if code == 504 else None)


def go_quote(text: str) -> str:
    """`text` as Go's %q shows plain text."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
