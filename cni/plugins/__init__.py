"""CNI plugins."""
