"""CNI 0.1.0 to 1.1.0 as values: requests, netconfs, results and the JSON they travel in."""
