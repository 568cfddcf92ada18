"""DHCPv4 for exactly one client, without IO: datagrams in, values out (RFC 2131, RFC 2132)."""
