"""Checkpoints on disk: families, placements, plans, the streaming writer, verify, count."""
