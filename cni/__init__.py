"""The bottom library: CNI protocol, kernel networking, the CNI plugins. Imports nothing of ours."""
