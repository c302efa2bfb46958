"""`verify`: measure what a split did, beside its controls, and decide."""
