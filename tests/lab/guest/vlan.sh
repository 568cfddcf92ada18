#!/bin/sh
# One pod on a VLAN-filtering bridge, from ADD to DEL. Usage: vlan.sh FOLDER < NETCONF
# FOLDER has the plugin `bridge` and what that executes. Prints one JSON object with what ADD and DEL said and
# what iproute2 shows after each; "" in place of a document that is none.
export CNI_PATH=$1 CNI_CONTAINERID=pod CNI_NETNS=/run/netns/pod CNI_IFNAME=eth0
ip=/usr/sbin/ip bridge=/usr/sbin/bridge
cat >/run/netconf

plugin() {
	CNI_COMMAND=$1 "$CNI_PATH/bridge" </run/netconf >/run/said 2>/dev/console
	status=$?
	printf '"%s": {"status": %s, "said": %s}, ' "$1" "$status" "$(grep . /run/said || echo '""')"
}

state() {
	printf '"%s": {"vlans": %s, "links": %s, "inside": %s, "reached": %s, "leases": "%s"}' "$1" \
		"$($bridge -j vlan show)" "$($ip -j -d address)" "$($ip -n pod -j address)" "$(reached)" \
		"$(ls /var/lib/cni/networks/vlan 2>/dev/null | grep -v -e lock -e reserved | tr '\n' ' ')"
}

# Whether the pod's gateways answer.
reached() {
	comma=
	printf '{'
	for gateway in 10.9.0.1 fd09::1; do
		$ip netns exec pod ping -c 1 -W 2 $gateway >/dev/null 2>&1 && answer=true || answer=false
		printf '%s"%s": %s' "$comma" $gateway $answer
		comma=,
	done
	printf '}'
}

$ip netns add pod
printf '{'
plugin ADD
state after_add
printf ', '
plugin DEL
state after_del
printf '}'
$ip netns del pod
$ip link del br0
[ ! -e /sys/class/net/br0.100 ] || $ip link del br0.100
rm -rf /var/lib/cni
