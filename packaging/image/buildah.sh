#!/usr/bin/env bash
# buildah with a store of its own in DIRECTORY, apart from the machine's images. The slowest of its storage
# drivers is the one that works everywhere. Usage: buildah.sh DIRECTORY WORD...
set -euo pipefail
directory=$(realpath "$1")
shift
exec buildah --storage-driver vfs --root "$directory/store" --runroot "$directory/run" "$@"
