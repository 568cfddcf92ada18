"""A guest's IPv6: its address by DHCPv6, its default route by router advertisements. No IO in here."""
