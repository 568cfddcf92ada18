"""Addresses of one node, as the host-local plugin hands them out: ranges, the store on disk, its index."""
