"""Ends a job in which a rank hangs: every rank that still can writes down its stacks, the culprit is named and killed.

Each rank has a thread that beats on a board that all ranks share, and knows how far the rank's main thread has come. When a main
thread has not come further for `seconds`, its thread sounds the alarm, and all others hear it within a beat. Who stands still is
told apart by looking twice: a rank that does not beat any more is stopped (or holds Python's lock for ever); where all beat, the
one that is furthest behind is what the others wait for.
"""

import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moexpand.base.claims import process_space
from moexpand.base.errors import ENVIRONMENT
from moexpand.parallel.board import Board

STACKS = "stacks"
"""Folder of the stacks in the run folder, a file a rank."""

FIRST = 3.0
"""How many times as long the first step may take: kernels are compiled, buffers and connections are made."""


@dataclass(frozen=True)
class Beat:
    """What a rank's thread tells of itself.

    Attributes:
        beats: how many there were.
        marks: how often the main thread has come to a mark; equal for ranks that are equally far.
        where: the last mark, for the reader.
        host: its name, for the reader.
        space: which processes a number tells apart.
        pid: the process's number.
    """

    beats: int
    marks: int
    where: str
    host: str
    space: str
    pid: int


class Watchdog:
    """Watches this rank and hears of the others; its thread starts at the first mark.

    Args:
        run: the run folder.
        rank, world_size: of this process.
        seconds: longest time between two marks; 0 watches nothing.
        board: of this attempt.
        leave_result: told why the job ends, before it does.
    """

    def __init__(
        self, run: Path, rank: int, world_size: int, seconds: float, board: Board, leave_result: Callable[[str], None]
    ) -> None:
        self._run, self._rank, self._world_size, self._seconds = run, rank, world_size, seconds
        self._board, self._leave_result = board, leave_result
        self._interval = min(5.0, seconds / 10)
        self._marks, self._where, self._marked = 0, "", time.monotonic()
        self._patience = FIRST * seconds
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self._file: Any = None

    def mark(self, where: str) -> None:
        """The main thread has come to a point that all ranks come to in the same order."""
        self._marks, self._where, self._marked = self._marks + 1, where, time.monotonic()
        if self._thread is None and self._seconds:
            folder = self._run / STACKS
            folder.mkdir(parents=True, exist_ok=True)
            self._file = open(folder / f"rank_{self._rank:05d}.txt", "w", encoding="utf-8")  # noqa: SIM115 - for the process's life
            self._beat(0)  # so that it is known whom to stop from the start
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    @property
    def where(self) -> str:
        """The last mark."""
        return self._where or "its start"

    def settle_in(self) -> None:
        """The first step is done: from now on there is only the ordinary patience."""
        self._patience = self._seconds

    def close(self) -> None:
        """Stop watching."""
        self._done.set()
        if self._thread is not None:
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()
            self._file.close()

    def _watch(self) -> None:
        beats = 0
        while not self._done.wait(self._interval):
            beats += 1
            # Should this thread not get a turn any more, Python's lock being held, the stacks are written without it.
            faulthandler.dump_traceback_later(self._patience + 2 * self._interval, file=self._file)
            late = time.monotonic() - self._marked > self._patience
            try:
                self._beat(beats)
                alarm = late or self._board.read("alarm") is not None
            except (
                Exception
            ):  # the store is gone, and with it the node that has it: the others' end is noticed by the collectives
                alarm = late
            if alarm:
                self._raise_alarm(beats)
                return

    def _beat(self, beats: int) -> None:
        beat = Beat(beats, self._marks, self._where, socket.gethostname(), process_space(), os.getpid())
        self._board.write(f"beat {self._rank}", json.dumps(asdict(beat)))

    def _raise_alarm(self, beats: int) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._dump()
        verdict = f"No rank answers any more; rank {self._rank} was last at {self._where}."
        stopped: list[int] = []
        with suppress(Exception):
            self._board.write("alarm", "")
            if self._board.first("judge"):
                verdict, stopped = self._judge(beats)
                self._board.write("verdict", json.dumps([verdict, stopped]))
            else:
                verdict, stopped = self._await_verdict(beats) or (verdict, stopped)
        with suppress(Exception):  # before connections close, of which the main threads would tell
            self._leave_result(verdict)
        for pid in stopped:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        print(f"watchdog: {verdict}", file=sys.stderr, flush=True)
        os._exit(ENVIRONMENT)

    def _dump(self) -> None:
        for file in (self._file, sys.stderr):
            with suppress(OSError, ValueError):
                file.write(f"Stacks of rank {self._rank} at {self._where}, newest call first:\n")
                file.flush()
                faulthandler.dump_traceback(file=file, all_threads=True)

    def _judge(self, beats: int) -> tuple[str, list[int]]:
        """Look at all ranks twice, some beats apart; returns a sentence and the processes of this host to kill."""
        before = self._beats_of_all()
        for more in range(4):
            time.sleep(self._interval)
            self._beat(beats + more + 1)
        after = self._beats_of_all()
        silent = [rank for rank, beat in after.items() if rank != self._rank and before[rank].beats == beat.beats]
        silent += [rank for rank in range(self._world_size) if rank not in after]
        if silent:
            named = ", ".join(_named(rank, after.get(rank)) for rank in silent)
            what = f"{named} {'has' if len(silent) == 1 else 'have'} stopped answering"
        else:
            least = min(beat.marks for beat in after.values())
            behind = [rank for rank, beat in after.items() if beat.marks == least]
            named = ", ".join(_named(rank, after[rank]) for rank in behind[:8])
            what = f"{named} {'is' if len(behind) == 1 else 'are'} furthest behind and did not come further"
            if len(behind) == self._world_size:
                what = f"all ranks stand still at {after[self._rank].where}"
        found = [after[rank] for rank in silent if rank in after]
        self._board.write("stopped", json.dumps([[beat.space, beat.pid] for beat in found]))
        sentence = (
            f"The job hung for {self._seconds:g} s (watchdog.seconds): {what}; stacks of the other ranks are in "
            f"{self._run / STACKS}. Start again to go on from the newest checkpoint."
        )
        return sentence, self._here(found)

    def _beats_of_all(self) -> dict[int, Beat]:
        found = {}
        for rank in range(self._world_size):
            text = self._board.read(f"beat {rank}")
            if text is not None:
                found[rank] = Beat(**json.loads(text))
        return found

    def _await_verdict(self, beats: int) -> tuple[str, list[int]] | None:
        """The judge's sentence and the stopped processes of this host; None when the judge is gone too."""
        for more in range(12):
            time.sleep(self._interval)
            self._beat(beats + more + 1)
            text = self._board.read("verdict")
            if text is not None:
                stopped = json.loads(self._board.read("stopped") or "[]")
                return json.loads(text)[0], [pid for space, pid in stopped if space == process_space()]
        return None

    @staticmethod
    def _here(beats: list[Beat]) -> list[int]:
        return [beat.pid for beat in beats if beat.space == process_space()]


def _named(rank: int, beat: Beat | None) -> str:
    if beat is None:
        return f"rank {rank} (never seen)"
    return f"rank {rank} (process {beat.pid} on {beat.host}, last at {beat.where})"
