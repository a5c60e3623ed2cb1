"""Starts workers: torchrun on this machine, and the quickstart that runs every stage."""
