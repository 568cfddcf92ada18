#!/bin/sh
# Docker's options from flannel's subnet.env, as upstream's script of this name writes them.
set -eu

usage() {
    cat >&2 <<EOF
Usage: $0 [-f FLANNEL-ENV-FILE] [-d DOCKER-ENV-FILE] [-i] [-c] [-m] [-k COMBINED-KEY]

Write the options for the Docker daemon that fit flannel's subnet.
  -f  flannel's file, default /run/flannel/subnet.env
  -d  the file to write, default /run/docker_opts.env
  -i  each option as a variable of its own, such as DOCKER_OPT_MTU
  -c  all options in one variable (without -i and -c: both)
  -k  the name of that one variable, default DOCKER_OPTS
  -m  leave --ip-masq out
EOF
    exit 1
}

flannel_env=/run/flannel/subnet.env
docker_env=/run/docker_opts.env
key=DOCKER_OPTS
single=false
combined=false
masquerade=true
while getopts 'f:d:icmk:h?' option; do
    case $option in
        f) flannel_env=$OPTARG ;;
        d) docker_env=$OPTARG ;;
        i) single=true ;;
        c) combined=true ;;
        m) masquerade=false ;;
        k) key=$OPTARG ;;
        *) usage ;;
    esac
done
case $key in
    '' | [0-9]* | *[!A-Za-z0-9_]*)
        echo "$0: -k '$key': not the name of a variable" >&2
        exit 1
        ;;
esac
if [ $single = false ] && [ $combined = false ]; then
    single=true
    combined=true
fi

if [ -f "$flannel_env" ]; then
    # A name without a slash would be looked for in PATH.
    case $flannel_env in */*) ;; *) flannel_env=./$flannel_env ;; esac
    . "$flannel_env"
fi
[ -z "${FLANNEL_SUBNET:-}" ] || DOCKER_OPT_BIP="--bip=$FLANNEL_SUBNET"
[ -z "${FLANNEL_MTU:-}" ] || DOCKER_OPT_MTU="--mtu=$FLANNEL_MTU"
if [ $masquerade = true ]; then
    # Only one of the two masquerades.
    case ${FLANNEL_IPMASQ:-} in
        '') ;;
        true) DOCKER_OPT_IPMASQ=--ip-masq=false ;;
        false) DOCKER_OPT_IPMASQ=--ip-masq=true ;;
        *)
            echo "$0: FLANNEL_IPMASQ is '$FLANNEL_IPMASQ' in $flannel_env: it must be true or false" >&2
            exit 1
            ;;
    esac
fi

eval "options=\${$key:-}"
: >"$docker_env"
# `set` lists in the order of the alphabet; a DOCKER_OPT_ variable that was there already goes along.
for name in $(set | sed -n 's/^\(DOCKER_OPT_[A-Za-z0-9_]*\)=.*/\1/p'); do
    eval "value=\$$name"
    [ $single = false ] || echo "$name=\"$value\"" >>"$docker_env"
    options="$options $value"
done
[ $combined = false ] || echo "$key=\"$options\"" >>"$docker_env"

# Docker refuses to start on a subnet that the kernel reaches through another host.
if [ -n "${FLANNEL_SUBNET:-}" ]; then
    route=$(ip -4 route show exact "$FLANNEL_SUBNET" 2>/dev/null | grep ' via ' | head -n 1) || route=
    if [ -n "$route" ]; then
        echo "$0: the kernel routes flannel's own subnet elsewhere ($route): remove that route, then start Docker" >&2
        exit 1
    fi
fi
