#!/usr/bin/env bash
# Make the image that `make image` builds on, from this machine's own sources of Debian packages: the essential
# packages and those that the Dockerfile asks for. It becomes localhost/base in the image store DIRECTORY.
# Usage: base.sh DIRECTORY
set -euo pipefail
directory=$1
packages=usr-is-merged,ca-certificates,iproute2,iptables,nftables
mkdir -p "$directory"
log=$directory/base.log tar=$directory/base.tar
run() { "$@" >"$log" 2>&1 || { tail -n 20 "$log" >&2; echo "error: $1 failed, see $log" >&2; exit 1; }; }
. /etc/os-release
shopt -s nullglob
sources=(/etc/apt/sources.list.d/*.list /etc/apt/sources.list.d/*.sources)
[ ! -e /etc/apt/sources.list ] || sources=(/etc/apt/sources.list "${sources[@]}")
[ ${#sources[@]} -gt 0 ] || { echo "error: apt has no sources of packages in /etc/apt" >&2; exit 1; }
echo "==> base image: Debian $VERSION_CODENAME, from the sources of packages in /etc/apt"
# How this machine reaches them (a proxy, say) goes for the base as well, but must not stay in it.
apt-config dump Acquire >"$directory/apt.conf"
run mmdebstrap --mode=root --variant=essential --include="$packages" \
    --hook-dir=/usr/share/mmdebstrap/hooks/merged-usr --aptopt="$directory/apt.conf" \
    --customize-hook='rm -rf "$1"/etc/apt/sources.list.d "$1"/etc/apt/apt.conf.d/99mmdebstrap' \
    --customize-hook='cd "$1" && rm -rf usr/share/doc usr/share/man usr/share/info usr/share/locale var/cache/debconf' \
    "$VERSION_CODENAME" "$tar" "${sources[@]}"
buildah=(packaging/image/buildah.sh "$directory")
run "${buildah[@]}" rm --all
container=$("${buildah[@]}" from scratch)
run "${buildah[@]}" add "$container" "$tar" /
run "${buildah[@]}" commit --rm "$container" localhost/base
rm "$tar" "$directory/apt.conf"
