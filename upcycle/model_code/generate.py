"""Insert the text of moexpand/base/routing.py, and of shared.py beside this file, into the model code that travels with children.

`python -m moexpand.upcycle.model_code.generate` rewrites the modelling files; a test compares the texts.
"""

import ast
from pathlib import Path

import moexpand.base
from moexpand.upcycle.model_code import HERE, every_code_file

SOURCES = (Path(moexpand.base.__file__).with_name("routing.py"), HERE / "shared.py")
MODELING = tuple(HERE / name for name in sorted(every_code_file()) if name.startswith("modeling_"))
BEGIN = "# ---- routing: begin (text of moexpand/base/routing.py and moexpand/upcycle/model_code/shared.py)\n"
END = "# ---- routing: end\n"


def routing_text() -> str:
    """Source text of the functions of all sources, one after the other."""
    functions = []
    for path in SOURCES:
        source = path.read_text(encoding="utf-8")
        nodes = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
        functions += [ast.get_source_segment(source, node) or "" for node in nodes]
    return "\n\n\n".join(functions)


def generated(modeling: Path) -> str:
    """A modelling file with the current functions."""
    before, rest = modeling.read_text(encoding="utf-8").split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}{routing_text()}\n\n\n{END}{after}"


if __name__ == "__main__":
    for path in MODELING:
        path.write_text(generated(path), encoding="utf-8")
