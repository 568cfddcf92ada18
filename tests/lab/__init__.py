"""A cluster on one machine: nodes, pods and an outside host as network namespaces.

`make demo` shows it; the end-to-end tests run in it. Every link, route, firewall rule and sysctl is
made inside namespaces of the lab's own, none on the host.

                outside   192.168.77.1, 203.0.113.1
                   |
    ---------- br0, the underlay 192.168.77.0/24 ----------
       |                       |                       |
     node1 eth0 .11          node2 eth0 .12          node3 eth0 .13
       pods                    pods                    pods
"""
