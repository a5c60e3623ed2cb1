"""moexpand: expand a trained Mixture-of-Experts checkpoint and continue pretraining it.

The source of `moexpand.train`, `moexpand.data`, ... lies in flat folders beside this one. An installed package holds them
inside itself (setup.py maps them); a plain checkout finds them because the line below adds the checkout's root to the
package's search path.
"""

from pathlib import Path

__version__ = "0.1.0"

_here = Path(__file__).resolve().parent
if not (_here / "train").is_dir() and (_here.parent / "train" / "__init__.py").is_file():
    __path__.append(str(_here.parent))
