"""Insert the text of moexpand/base/routing.py into the model code that travels with a child.

`python -m moexpand.upcycle.model_code.generate` rewrites the file; a test compares the two texts.
"""

import ast
from pathlib import Path

import moexpand.base

ROUTING = Path(moexpand.base.__file__).with_name("routing.py")
MODELING = Path(__file__).with_name("modeling_qwen3_moe_grouped.py")
BEGIN = "# ---- routing: begin (text of moexpand/base/routing.py)\n"
END = "# ---- routing: end\n"


def routing_text() -> str:
    """Source text of the functions of routing.py, one after the other."""
    source = ROUTING.read_text(encoding="utf-8")
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    return "\n\n\n".join(ast.get_source_segment(source, function) or "" for function in functions)


def generated() -> str:
    """The modelling file with the current routing functions."""
    before, rest = MODELING.read_text(encoding="utf-8").split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}{routing_text()}\n\n\n{END}{after}"


if __name__ == "__main__":
    MODELING.write_text(generated(), encoding="utf-8")
