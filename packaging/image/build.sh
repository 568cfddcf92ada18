#!/usr/bin/env bash
# Build the container image on localhost/base of the image store DIRECTORY, with the programs that are frozen in
# dist/, and write it to ARCHIVE (OCI). Usage: build.sh DIRECTORY ARCHIVE
set -euo pipefail
directory=$1 archive=$2
log=$directory/build.log
run() { "$@" >"$log" 2>&1 || { tail -n 20 "$log" >&2; echo "error: $* failed, see $log" >&2; exit 1; }; }
buildah=(packaging/image/buildah.sh "$directory")
image=$(sed -n 's/^ *image: *//p' packaging/kube-flannel.yml | sort -u)
echo "==> image $image"
# What a build that failed has left.
run "${buildah[@]}" rm --all
run "${buildah[@]}" build --isolation chroot --pull-never --build-arg BASE=localhost/base \
    --volume "$PWD/dist:/mnt:ro" --ignorefile packaging/Dockerfile.dockerignore \
    -f packaging/Dockerfile -t localhost/flannel .
mkdir -p "$(dirname "$archive")"
rm -f "$archive"
run "${buildah[@]}" push localhost/flannel "oci-archive:$archive:docker.io/$image"
run "${buildah[@]}" rmi localhost/flannel
echo "==> $archive: $(du -h "$archive" | cut -f 1)"
