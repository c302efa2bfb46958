"""Measure models that need not exist on disk: token losses at any weights, streamed or resident."""
