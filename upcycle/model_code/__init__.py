"""Model code that travels inside a grouped child, for engines that do not know groups themselves."""

from pathlib import Path
from typing import Any

from moexpand.base.files import sha256, write_atomic

HERE = Path(__file__).parent
CODE = {
    "qwen3_moe_grouped": ("configuration_qwen3_moe_grouped.py", "modeling_qwen3_moe_grouped.py"),
    "qwen3_vl_moe_grouped": ("configuration_qwen3_vl_moe_grouped.py", "modeling_qwen3_vl_moe_grouped.py"),
    # a published Intern-S1-Pro brings files of its own, modeling_interns1_pro.py and the like
    "interns1_pro": ("configuration_interns1_pro_moexpand.py", "modeling_interns1_pro_moexpand.py"),
}


def code_files(config: dict[str, Any]) -> tuple[str, ...]:
    """Names of our files that a checkpoint with this config.json carries: those of its type, where its `auto_map` names them."""
    named = {str(target).partition(".")[0] for target in (config.get("auto_map") or {}).values()}
    return tuple(name for name in CODE.get(config.get("model_type", ""), ()) if name.removesuffix(".py") in named)


def every_code_file() -> frozenset[str]:
    """Names of all files of model code, of whatever type: a folder that is copied to another type leaves its own behind."""
    return frozenset(name for names in CODE.values() for name in names)


def write_model_code(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Put the model code that `config` names into a checkpoint folder; returns the SHA-256 of each file by name."""
    for name in code_files(config):
        write_atomic(folder / name, (HERE / name).read_bytes())
    return {name: sha256(folder / name) for name in code_files(config)}
