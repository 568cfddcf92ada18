"""Subnet managers: who owns which subnet."""
