"""Files of Debian packages without installing anything: packages are downloaded into a folder and unpacked there.

No rights are needed, and a machine without apt-get and dpkg, or without a package archive in reach, is told of by False.
"""

import subprocess
from pathlib import Path

PACKAGE_SECONDS = 60.0
UPDATE_SECONDS = 90.0


def run(command: list[str], where: Path | None, seconds: float) -> bool:
    """Whether a command ended with exit code 0 in this time."""
    try:
        return subprocess.run(command, cwd=where, capture_output=True, timeout=seconds, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def download(package: str, where: Path, options: list[str]) -> bool:
    """Put a package's archive into the folder `where` and unpack it into `where`/root.

    Args:
        package: its name, alone or as NAME=VERSION.
        options: of apt-get; see `private_lists`.
    """
    if not run(["apt-get", *options, "download", package], where, PACKAGE_SECONDS):
        return False
    archives = list(where.glob("*.deb"))
    return bool(archives) and run(["dpkg", "-x", str(archives[0]), str(where / "root")], None, PACKAGE_SECONDS)


def private_lists(folder: Path) -> list[str]:
    """Options of apt-get that keep its lists in a folder of ours, after filling it: fresh containers have none."""
    (folder / "lists" / "partial").mkdir(parents=True)
    (folder / "cache" / "archives" / "partial").mkdir(parents=True)
    options = ["-o", f"Dir::State::Lists={folder / 'lists'}", "-o", f"Dir::Cache={folder / 'cache'}"]
    run(["apt-get", *options, "update"], None, UPDATE_SECONDS)
    return options
