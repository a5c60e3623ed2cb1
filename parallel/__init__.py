"""Everything that knows ranks, with every Megatron-Core object behind a small interface."""
