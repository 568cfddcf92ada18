"""Backends: how packets travel between nodes."""
