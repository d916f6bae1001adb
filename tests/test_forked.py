"""A process that is a fork is what a new one is."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from forked import run_python

PROGRAMS = {
    "annotations": "def f(x: Missing): ...",
    "status": "import sys; print(sys.argv); sys.exit(3)",
    "error": "1 / 0",
    "unflushed": "import sys; sys.stdout.write('a'); sys.stderr.write('b')",
    "at exit": "import atexit; atexit.register(print, __name__)",
    "folder": "import os; print(os.getcwd())",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_as_a_new_process(name: str, tmp_path: Path) -> None:
    words = ["-c", PROGRAMS[name], "word"]
    new = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=tmp_path)
    fork = run_python(words, cwd=tmp_path)
    assert (fork.returncode, fork.stdout) == (new.returncode, new.stdout)
    assert fork.stderr.splitlines()[-1:] == new.stderr.splitlines()[-1:]


def test_one_that_is_interrupted_spoils_no_other() -> None:
    def interrupt(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(TimeoutError):
            run_python(["-c", "import time; time.sleep(600)"])
    finally:
        signal.signal(signal.SIGALRM, before)
    assert run_python(["-c", "print(2)"]).stdout == "2\n"


def test_what_counts_at_the_start_alone_is_refused() -> None:
    with pytest.raises(AssertionError, match="process of its own"):
        run_python(["-c", ""], env={"OMP_NUM_THREADS": "7"})
    with pytest.raises(AssertionError, match="no other option"):
        run_python(["-X", "utf8", "-c", ""])
