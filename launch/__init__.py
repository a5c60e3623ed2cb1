"""Starts workers: torchrun on this machine, SLURM, scripts for several nodes, the quickstart that runs every stage."""
