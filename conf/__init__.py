"""Typed configuration: dataclasses (schema.py), Hydra YAML groups beside them, composition and checks."""
