"""`verify`: measure what a split did, beside its controls, and decide."""

CHECKS = {
    "integrity": "integrity",
    "lmc": "connectivity",
    "canary": "extraction",
    "sweep": "sweep",
    "entanglement": "entanglement",
    "samples": "samples",
    "controls": "controls",
    "spectrum": "spectrum",
    "attacks": "attacks",
    "reasoning": "reasoning",
    "tofu": "tofu",
}
"""A check's name on the command line → its module here, in the order they run. Each has `run(subject) -> Result`."""
