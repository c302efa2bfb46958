"""The dose: how much to remove, chosen by measuring. Runs the curvature passes it needs, probes, and searches to a target."""
