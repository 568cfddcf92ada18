#!/usr/bin/env bash
# Unpack Debian's newest cloud kernel below DIRECTORY, for the guests of the demo and the tests. It is not
# installed: a kernel in /boot would be one that this machine may start next. Usage: fetch-guest-kernel.sh DIRECTORY
set -euo pipefail
directory=$1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
newest() { apt-cache depends linux-image-cloud-amd64 2>/dev/null | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)$/\1/p' | head -n 1; }
run() { "$@" >"$work/log" 2>&1 || { tail -n 20 "$work/log" >&2; echo "error: $* failed" >&2; exit 1; }; }

package=$(newest)
if [ -z "$package" ]; then
    run apt-get update -q
    package=$(newest)
fi
[ -n "$package" ] || { echo "error: no package linux-image-cloud-amd64 in the sources of apt" >&2; exit 1; }
echo "==> guest kernel: unpacking $package below $directory (it is not installed)"
chmod 755 "$work"
cd "$work"
# What the index names may be gone from the archive since it was read.
apt-get download -q "$package" >"$work/log" 2>&1 || { run apt-get update -q; package=$(newest); run apt-get download -q "$package"; }
cd - >/dev/null
rm -rf "$directory"
mkdir -p "$directory"
run dpkg-deb -x "$work"/linux-image-*.deb "$directory"
run depmod -b "$directory" "${package#linux-image-}"
