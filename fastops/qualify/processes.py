"""Runs cases in processes of their own: one that crashes or hangs takes nothing along but itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import IO, Final

import torch

from .cases import FAILED, Result

COMMAND: Final = (sys.executable, "-m", "fastops.qualify")
CASE_SECONDS: Final = 240.0  # A case that takes longer hangs.


class Process:
    """A process that runs cases of one part, one after the other."""

    def __init__(self, part: str, device: torch.device, environment: dict[str, str]) -> None:
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (it goes with the object)
        self._process = subprocess.Popen(
            [*COMMAND, part, str(device)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=os.environ | environment,
        )

    def run(self, name: str, seconds: float) -> tuple[Result | None, bool]:
        """The result of a case, None if the process ended before there was one; and whether it takes another."""
        timer = threading.Timer(seconds, self._process.kill)
        timer.start()
        try:
            assert self._process.stdin and self._process.stdout
            self._process.stdin.write(f"{name}\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if not line.endswith("\n"):
            return None, False
        found = json.loads(line)
        return Result(**found["result"]), found["lives"]

    def ended(self) -> str:
        """How it ended, in one line."""
        status = self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip().rpartition("\n")[2][:300]
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
        return f"the process ended with {how}" + (f": {said}" if said else "")

    def stop(self) -> None:
        """End it, whatever it does."""
        self._process.kill()
        self._process.wait()


class Pool:
    """Processes side by side, until the deadline (of `time.monotonic`)."""

    def __init__(self, part: str, device: torch.device, deadline: float, environment: dict[str, str]) -> None:
        self._part, self._device, self._deadline, self._environment = part, device, deadline, environment
        self._own = threading.local()  # each thread has a process
        self._all: list[Process] = []
        self._lock, self._stopped = threading.Lock(), False

    def results(self, names: Sequence[str], count: int) -> Iterator[Result]:
        """The results of cases as they come, at most ``count`` at a time; none of those that there is no time for."""
        pool = ThreadPoolExecutor(count)
        try:
            for future in as_completed([pool.submit(self._run, name) for name in names]):
                if (result := future.result()) is not None:
                    yield result
        finally:  # also if nobody wants the rest
            with self._lock:
                self._stopped = True
            for process in self._all:
                process.stop()
            pool.shutdown(cancel_futures=True)

    def _process(self) -> Process | None:
        """That of this thread, or a new one."""
        with self._lock:
            if getattr(self._own, "process", None) is None and not self._stopped:
                self._own.process = Process(self._part, self._device, self._environment)
                self._all.append(self._own.process)
            return None if self._stopped else self._own.process

    def _run(self, name: str) -> Result | None:
        start = time.monotonic()
        left = self._deadline - start
        if left <= 0 or (process := self._process()) is None:
            return None
        result, lives = process.run(name, min(left, CASE_SECONDS))
        if not lives:
            self._own.process = None
        took = time.monotonic() - start
        if result is not None or self._stopped or took >= left:
            return result
        reason = f"it took longer than {CASE_SECONDS:.0f} s" if took >= CASE_SECONDS else process.ended()
        return Result(name, FAILED, reason, round(took, 3), {})
