"""Kernel networking: entries, plans, netlink, namespaces, firewall."""
