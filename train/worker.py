"""The frame around every worker: compose, run, leave one result for the launcher."""

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moexpand.base.errors import DONE, ENVIRONMENT, STOPPED, MoexpandError
from moexpand.base.result import write_result
from moexpand.conf.compose import compose_words


def work(command: str, words: list[str], folder_of: Callable[[Any], Path], run: Callable[[Any], None]) -> int:
    """Run one worker.

    Args:
        command: whose configuration the words compose.
        words: the worker's command line.
        folder_of: where the result goes, given the configuration.
        run: the work; it leaves the process groups itself when all went well.

    Returns:
        The process's exit code. torchrun stops the peers of a worker that fails; workers that were all asked to stop end by
        themselves, so to torchrun that is no failure.
    """
    folder: Path | None = None
    try:
        config = compose_words(command, words)
        folder = folder_of(config)
        folder.mkdir(parents=True, exist_ok=True)
        run(config)
        code, message = DONE, ""
    except MoexpandError as error:
        code, message = error.exit_code, str(error)
        traceback.print_exc()
    except Exception as error:
        code, message = ENVIRONMENT, _told(error)
        traceback.print_exc()
    if folder is not None and (code or os.environ.get("RANK", "0") == "0"):
        write_result(folder, code, message, attempt())
    if code not in (DONE, STOPPED):
        # The groups are left as they are: an orderly end would wait for peers, and their complaint would come before ours.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return DONE if code == STOPPED and attempt() else code


def _told(error: Exception) -> str:
    """The sentence for an error that nobody foresaw."""
    if "moexpand.parallel.ranks" in sys.modules:  # otherwise it had no peers yet, and torch is not needed to say so
        from moexpand.parallel.ranks import lost_peer

        fate = lost_peer(error)
        if fate is not None:
            where = "".join(f" at {note}" for note in getattr(error, "__notes__", ()))
            return (
                f"Rank {os.environ.get('RANK', '0')} stopped{where} because a peer {fate}; find in the log which rank failed "
                "first and why, then start again (training goes on from the newest checkpoint)."
            )
    first = (str(error).splitlines() or [""])[0]
    return f"A worker failed with {type(error).__name__}: {first}"


def attempt() -> str:
    """Identity of torchrun's present attempt, the same for all its workers; empty without torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ""
    return ":".join(
        os.environ[name] for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_ADDR", "MASTER_PORT")
    )
