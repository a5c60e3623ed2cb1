"""Model code that travels inside a grouped child, for engines that do not know groups themselves."""

from pathlib import Path

from moexpand.base.files import sha256, write_atomic

HERE = Path(__file__).parent
CODE = {
    model_type: (f"configuration_{model_type}.py", f"modeling_{model_type}.py")
    for model_type in ("qwen3_moe_grouped", "qwen3_vl_moe_grouped")
}


def code_files(model_type: str) -> tuple[str, ...]:
    """Names of the files that a checkpoint of this type carries; none for types that transformers knows."""
    return CODE.get(model_type, ())


def every_code_file() -> frozenset[str]:
    """Names of all files of model code, of whatever type: a folder that is copied to another type leaves its own behind."""
    return frozenset(name for names in CODE.values() for name in names)


def write_model_code(folder: Path, model_type: str) -> dict[str, str]:
    """Put the model code of `model_type` into a checkpoint folder; returns the SHA-256 of each file by name."""
    for name in code_files(model_type):
        write_atomic(folder / name, (HERE / name).read_bytes())
    return {name: sha256(folder / name) for name in code_files(model_type)}
