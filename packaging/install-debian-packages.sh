#!/usr/bin/env bash
# Install those of the listed Debian packages that are missing. Usage: install-debian-packages.sh FILE
set -euo pipefail
list=$1
missing=()
while read -r package purpose; do
    case $package in ''|'#'*) continue ;; esac
    # A package that is installed in part, or removed with its configuration left, counts as missing.
    if [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)" != installed ]; then
        echo "==> $package is missing ($purpose)"
        missing+=("$package")
    fi
done < "$list"
[ ${#missing[@]} -gt 0 ] || exit 0
if [ "$(id -u)" != 0 ]; then
    echo "error: installing ${missing[*]} needs root: run this as root, or apt-get install them yourself" >&2
    exit 1
fi
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
trap 'rm -f "$log"' EXIT
run() { "$@" >"$log" 2>&1 || { tail -n 20 "$log" >&2; echo "error: $* failed" >&2; exit 1; }; }
echo "==> apt-get update"
run apt-get update -q
echo "==> apt-get install ${missing[*]}"
# No service that comes with a package is started: the tests start their own, in their own namespaces.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod 755 "$policy"
    trap 'rm -f "$log" "$policy"' EXIT
fi
run apt-get install -q -y --no-install-recommends "${missing[@]}"
