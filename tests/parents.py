"""Small random Qwen3-MoE parents, written by transformers itself, and their children."""

import json
from pathlib import Path
from typing import Any

TINY: dict[str, Any] = {
    "experts": 8,
    "top_k": 2,
    "hidden": 32,
    "layers": 1,
    "intermediate": 8,
    "vocab": 64,
    "heads": 2,
    "kv_heads": 1,
}
"""The smallest shape of `make_parent` that still has groups, heads and experts to mix up."""


def make_parent(
    folder: Path,
    *,
    experts: int = 128,
    top_k: int = 8,
    hidden: int = 64,
    layers: int = 2,
    intermediate: int = 32,
    vocab: int = 256,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    dtype: str = "float32",
    tie: bool = False,
    seed: int = 0,
    max_shard_size: str = "2MB",
    norm_topk_prob: bool = True,
    hub_form: bool = True,
    **more: Any,
) -> Path:
    """Write a random parent with `save_pretrained` and return its folder.

    Matrices are drawn with a standard deviation of 1 / sqrt(fan in) and router rows three times wider, norms around 1, so that
    attention, routing and experts all matter to the logits (transformers' own 0.02 would hide mistakes below the tolerances).

    Args:
        hub_form: config.json as on the hub (`num_experts`, `rope_theta`, `torch_dtype`); otherwise as transformers 5 writes it
            (`num_local_experts`, `rope_parameters`, `dtype`).
        more: other keys of the config, `mlp_only_layers`.
    """
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        num_experts=experts,
        num_experts_per_tok=top_k,
        moe_intermediate_size=intermediate,
        norm_topk_prob=norm_topk_prob,
        max_position_embeddings=512,
        rope_parameters={"rope_theta": 1e6, "rope_type": "default"},
        tie_word_embeddings=tie,
        max_window_layers=layers,
        bos_token_id=0,
        eos_token_id=1,
        **more,
    )
    model = Qwen3MoeForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(1 + 0.1 * noise)
            else:
                parameter.copy_(noise * (3.0 if name.endswith("mlp.gate.weight") else 1.0) / parameter.shape[-1] ** 0.5)
    folder = Path(folder)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=max_shard_size)
    if hub_form:
        _write_hub_form(folder / "config.json")
    return folder


def _write_hub_form(path: Path) -> None:
    config: dict[str, Any] = json.loads(path.read_text())
    if "num_local_experts" in config:
        config["num_experts"] = config.pop("num_local_experts")
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    config["rope_scaling"] = None
    config["torch_dtype"] = config.pop("dtype")
    path.write_text(json.dumps(config, indent=2))


def make_child(
    parent: Path,
    folder: Path,
    *,
    placement: str = "halves_bits",
    num_experts: int = 512,
    num_groups: int = 8,
    max_shard_size: str = "5MB",
    workers: int = 2,
    **wishes: Any,
) -> Path:
    """Expand `parent` into `folder` with the project's own writer and return the folder; see `Wishes` for the other words."""
    from moexpand.upcycle.checkpoint import open_checkpoint
    from moexpand.upcycle.planner import Wishes, make_plan
    from moexpand.upcycle.recipe import Recipe
    from moexpand.upcycle.writer import expand

    opened = open_checkpoint(parent)
    plan = make_plan(opened, Wishes(num_experts=num_experts, num_groups=num_groups, placement=placement, **wishes))
    expand(Recipe(opened, plan), Path(folder), max_shard_size=max_shard_size, workers=workers)
    return Path(folder)
