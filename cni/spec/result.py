"""Results of ADD in their three forms, and the way from one to another.

    legacy    0.1.0 0.2.0          ip4, ip6 (ip, gateway, routes), dns
    middle    0.3.0 0.3.1 0.4.0    interfaces, ips (with version), routes, dns
    current   1.0.0 1.1.0          interfaces, ips, routes, dns (left out when empty)

A result is a dict in the key order of its form, made by `parse`, which drops what the form does not know and
prints addresses canonically. Losses of each conversion are those of the Go library: going to legacy keeps the
first address of each family and the routes of these families, reduced to dst and gw.

Source: CNI 1.1.0, "Result Types", and its earlier versions.
"""

from __future__ import annotations

from cni.spec import gojson
from cni.spec.address import format_ip, parse_cidr, parse_ip

_LEGACY = ("0.1.0", "0.2.0")
_MIDDLE = ("0.3.0", "0.3.1", "0.4.0")
_CURRENT = ("1.0.0", "1.1.0")
_INT64 = 2**63 - 1


class ResultError(ValueError):
    """A result cannot be read, or has no form in the wanted version."""


def parse(document: bytes | gojson.Object, default_version: str) -> gojson.Object:
    """Read a result by the version that it declares, or by `default_version`; raises ResultError."""
    try:
        record = gojson.load_object(document) if isinstance(document, bytes) else document
        version = gojson.typed(record, "cniVersion", str, "") or default_version
        form = _form(version)
        body = _parse_legacy(record) if form is _LEGACY else _parse_modern(record, form)
    except ResultError:
        raise
    except ValueError as exc:
        raise ResultError(f"failed to unmarshal raw result: {exc}") from None
    return {"cniVersion": version, **body}


def convert(result: gojson.Object, version: str) -> gojson.Object:
    """`result`, which `parse` or `convert` made, in the form of `version`; raises ResultError."""
    if result["cniVersion"] == version and version in _CURRENT:
        return {**result}
    source, target = _form(str(result["cniVersion"])), _form(version)
    if source is target:
        return {**result, "cniVersion": version}
    if target is _LEGACY:
        return {"cniVersion": version, **_to_legacy(result)}
    modern = _from_legacy(result) if source is _LEGACY else result
    return {"cniVersion": version, **_parse_modern(modern, target)}


def check_family(declared: str, wanted: str) -> None:
    """Raise ResultError unless a result of version `declared` is read by who speaks `wanted`."""
    form = _form(wanted)
    if declared not in form:
        text = f"result type supports [{' '.join(form)}] but unmarshalled CNIVersion is "
        raise ResultError(text + gojson.dumps(declared))


def with_gateways(result: gojson.Object) -> gojson.Object:
    """A middle or current result whose routes name the gateway that the plugins gave them in the kernel.

    That is, for a route without one, the first gateway of its family. CHECK of the bridge plugin 1.1.1 looks
    for each route with just the gateway that is written, and so never finds one without.
    """
    gateways: dict[bool, object] = {}
    for one in _list(result, "ips"):
        gateway = _object(one, "ips").get("gateway")
        if gateway:
            gateways.setdefault(":" in str(gateway), gateway)
    routes = []
    for one in _list(result, "routes"):
        route = _object(one, "routes")
        gateway = route.get("gw") or gateways.get(":" in str(route["dst"]))
        routes.append({**route, "gw": gateway} if gateway else route)
    return {**result, "routes": routes} if routes else result


def write(result: gojson.Object) -> bytes:
    """The result as the Go plugins print it: 4 spaces, no final newline, current results sorted by key."""
    return gojson.dumps(result, indent="    ", sort=result["cniVersion"] in _CURRENT).encode()


def interfaces(prev_result: gojson.Object | None) -> list[gojson.Object]:
    """The interfaces of a prevResult, whatever its version; none if it is of no use."""
    found = gojson.member(prev_result or {}, "interfaces")
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def interface(prev_result: gojson.Object | None, name: str, sandbox: str) -> gojson.Object | None:
    """The interface of that name and sandbox, None if prevResult does not list it."""
    for one in interfaces(prev_result):
        if one.get("name") == name and one.get("sandbox") == sandbox:
            return one
    return None


def _form(version: str) -> tuple[str, ...]:
    for form in (_CURRENT, _MIDDLE, _LEGACY):
        if version in form:
            return form
    raise ResultError(f"unsupported CNI result version {gojson.dumps(version)}")


def _parse_legacy(record: gojson.Object) -> gojson.Object:
    body: gojson.Object = {}
    for name in ("ip4", "ip6"):
        config = gojson.typed(record, name, dict, {})
        if gojson.member(record, name) is None:
            continue
        parsed: gojson.Object = {"ip": _cidr(config, "ip", name)}
        _put(parsed, gateway=_ip(config, "gateway"), routes=parse_routes(_list(config, "routes")))
        body[name] = parsed
    body["dns"] = parse_dns(record)
    return body


def _parse_modern(record: gojson.Object, form: tuple[str, ...]) -> gojson.Object:
    body: gojson.Object = {}
    _put(
        body,
        interfaces=[_interface(_object(one, "interfaces"), form) for one in _list(record, "interfaces")],
        ips=[_address(_object(one, "ips"), form) for one in _list(record, "ips")],
        routes=parse_routes(_list(record, "routes")),
    )
    dns = parse_dns(record)
    if dns or form is _MIDDLE:
        body["dns"] = dns
    return body


def _interface(record: gojson.Object, form: tuple[str, ...]) -> gojson.Object:
    parsed: gojson.Object = {"name": gojson.typed(record, "name", str, "")}
    _put(parsed, mac=gojson.typed(record, "mac", str, ""))
    if form is _CURRENT:
        _put(parsed, mtu=_integer(record, "mtu"))
    _put(parsed, sandbox=gojson.typed(record, "sandbox", str, ""))
    if form is _CURRENT:
        _put(parsed, socketPath=gojson.typed(record, "socketPath", str, ""))
        _put(parsed, pciID=gojson.typed(record, "pciID", str, ""))
    return parsed


def _address(record: gojson.Object, form: tuple[str, ...]) -> gojson.Object:
    address = _cidr(record, "address", "ips")
    parsed: gojson.Object = {"version": "6" if ":" in address else "4"} if form is _MIDDLE else {}
    index = _integer(record, "interface")
    if index is not None:
        parsed["interface"] = index
    parsed["address"] = address
    _put(parsed, gateway=_ip(record, "gateway"))
    return parsed


def parse_routes(records: list[object]) -> list[gojson.Object]:
    """Routes with what the library's Route type knows, in its key order; raises ValueError."""
    routes = []
    for record in records:
        route = _object(record, "routes")
        parsed: gojson.Object = {"dst": _cidr(route, "dst", "routes")}
        _put(parsed, gw=_ip(route, "gw"))
        for name in ("mtu", "advmss", "priority"):
            _put(parsed, **{name: _integer(route, name)})
        for name in ("table", "scope"):
            number = _integer(route, name)
            if number is not None:
                parsed[name] = number
        routes.append(parsed)
    return routes


def parse_dns(record: gojson.Object) -> gojson.Object:
    """The `dns` of a result or a netconf, without what is empty; raises GoJsonError, ResultError."""
    dns = gojson.typed(record, "dns", dict, {})
    parsed: gojson.Object = {}
    _put(
        parsed,
        nameservers=_strings(dns, "nameservers"),
        domain=gojson.typed(dns, "domain", str, ""),
        search=_strings(dns, "search"),
        options=_strings(dns, "options"),
    )
    return parsed


def _from_legacy(result: gojson.Object) -> gojson.Object:
    ips: list[object] = []
    routes: list[object] = []
    for name in ("ip4", "ip6"):
        config = gojson.typed(result, name, dict, {})
        if config:
            ips.append({"address": config["ip"], "gateway": config.get("gateway")})
            routes += _list(config, "routes")
    return {"ips": ips, "routes": routes, "dns": result.get("dns")}


def _to_legacy(result: gojson.Object) -> gojson.Object:
    body: gojson.Object = {}
    for one in _list(result, "ips"):
        address = _object(one, "ips")
        name = "ip6" if ":" in str(address["address"]) else "ip4"
        if name not in body:
            config: gojson.Object = {"ip": address["address"]}
            _put(config, gateway=address.get("gateway"), routes=_routes_of(result, name == "ip6"))
            body[name] = config
    if not body:
        raise ResultError("cannot convert: no valid IP addresses")
    ordered: gojson.Object = {name: body[name] for name in ("ip4", "ip6") if name in body}
    ordered["dns"] = result.get("dns", {})
    return ordered


def _routes_of(result: gojson.Object, six: bool) -> list[gojson.Object]:
    routes = [_object(one, "routes") for one in _list(result, "routes")]
    return [
        {name: route[name] for name in ("dst", "gw") if name in route}
        for route in routes
        if (":" in str(route["dst"])) == six
    ]


def _put(record: gojson.Object, **members: object) -> None:
    """Add what is neither empty nor 0, as Go's omitempty."""
    record.update((name, value) for name, value in members.items() if value)


def _list(record: gojson.Object, name: str) -> list[object]:
    return gojson.typed(record, name, list, [])


def _object(value: object, where: str) -> gojson.Object:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ResultError(f"{where} must hold objects, found {gojson.kind(value)}")
    return value


def _strings(record: gojson.Object, name: str) -> list[object]:
    values = _list(record, name)
    for value in values:
        if not isinstance(value, str):
            raise ResultError(f"{name} must hold strings, found {gojson.kind(value)}")
    return values


def _integer(record: gojson.Object, name: str) -> int | None:
    value = gojson.member(record, name)
    if isinstance(value, int) and not isinstance(value, bool):
        return value  # parsed before
    return gojson.integer(record, name, None, -_INT64 - 1, _INT64)


def _cidr(record: gojson.Object, name: str, where: str) -> str:
    text = gojson.typed(record, name, str, "")
    if not text:
        raise ResultError(f"{where} has an entry without {name}, an address with its prefix length")
    return str(parse_cidr(text))


def _ip(record: gojson.Object, name: str) -> str:
    text = gojson.typed(record, name, str, "")
    return format_ip(*parse_ip(text)) if text else ""
