"""Which code a run was made by, for its checkpoints and its records."""

import subprocess
from importlib import metadata
from pathlib import Path

import moexpand

PACKAGES = ("torch", "megatron-core", "transformers")


def made_by() -> dict[str, str]:
    """Versions of moexpand and of what it stands on; the git revision where it runs from a checkout, with `+` when changed."""
    found = {"moexpand": moexpand.__version__, **{name: metadata.version(name) for name in PACKAGES}}
    revision = git_revision(Path(moexpand.__file__).resolve().parents[1])
    return found | ({"git": revision} if revision else {})


def git_revision(folder: Path) -> str:
    """The commit that a checkout stands at; empty where the folder is no checkout of its own, or git is missing."""
    if not (folder / ".git").exists():
        return ""
    try:
        words = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
        return subprocess.run(words, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
