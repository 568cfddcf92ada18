"""The bottom library: CNI protocol, kernel networking, the CNI plugins. Imports nothing of ours."""

__version__ = "0.1.0"
