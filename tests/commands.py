"""The real command, in a process of its own or in this one."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_FROM_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def start(*words: object) -> subprocess.Popen[str]:
    """Start `moexpand WORDS...` and leave it running."""
    environment = {name: value for name, value in os.environ.items() if name not in _FROM_TORCHRUN}
    return subprocess.Popen(
        [sys.executable, "-m", "moexpand", *map(str, words)],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def moexpand(*words: object, timeout: float = 240.0) -> subprocess.CompletedProcess[str]:
    """Run `moexpand WORDS...` to its end."""
    process = start(*words)
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def run_here(*words: object) -> int:
    """Run `moexpand WORDS...` in this process and return its exit code."""
    from moexpand.cli import main

    return main([str(word) for word in words])


def sentence(done: subprocess.CompletedProcess[str], code: int) -> str:
    """The one sentence on standard error of a command that ended with `code`."""
    lines = done.stderr.strip().splitlines()
    assert done.returncode == code, (done.returncode, done.stderr)
    assert len(lines) == 1, f"one sentence, not {len(lines)} lines: {done.stderr}"
    assert lines[0].startswith("moexpand: "), lines
    assert lines[0].endswith("."), lines
    return lines[0].removeprefix("moexpand: ")
