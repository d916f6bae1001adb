"""Runs Python programs in new processes that need not import torch again, which takes longer than most of them.

They are forks of a process that has imported torch and nothing else: not this project, not Triton, and none of the
settings that these tests run under. Arguments, environment, folder, output and exit are those of a process of its own,
but for what Python and torch read when they start: the numbers of threads, Python's own variables and the seed of its
hashes are those of the tests' process.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NoReturn


def run_python(
    words: Sequence[str | Path], *, cwd: str | Path | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """What ``subprocess.run([sys.executable, *words], capture_output=True, text=True)`` returns."""
    options, rest = [], [str(word) for word in words]
    while rest[0] == "-W":
        options, rest = [*options, *rest[:2]], rest[2:]
    assert rest[0] in ("-c", "-m") or not rest[0].startswith("-"), "no other option of Python is known here"
    with tempfile.TemporaryDirectory() as folder:
        outputs = [str(Path(folder, name)) for name in ("out", "err")]
        environment = dict(os.environ if env is None else env)
        assert _at_start(environment) == _at_start(_ENVIRONMENT), "a process of its own is needed"
        request = {"words": rest, "cwd": str(cwd or os.getcwd()), "env": environment, "outputs": outputs}
        server = _server(os.getpid(), *options)
        assert server.stdin is not None and server.stdout is not None
        try:
            server.stdin.write(json.dumps(request) + "\n")
            server.stdin.flush()
            status = int(server.stdout.readline())
        except BaseException:  # what it answers to the next request would be the status of this one
            os.killpg(server.pid, signal.SIGKILL)
            _server.cache_clear()
            raise
        printed, errors = (Path(path).read_text() for path in outputs)
    return subprocess.CompletedProcess([sys.executable, *map(str, words)], status, printed, errors)


def run_counting(script: Path) -> subprocess.CompletedProcess[str]:
    """`run_python` of a script that counts what interpreted kernels do, with what `interpreter.overhead` spares it."""
    code = f"""
import runpy, sys
sys.path[:0] = {[str(Path(__file__).parent), str(script.parent)]}
from interpreter import overhead
overhead.install()
runpy.run_path({str(script)!r}, run_name="__main__")
"""
    return run_python(["-c", code])


_ENVIRONMENT = dict(os.environ)


def _at_start(environment: Mapping[str, str]) -> dict[str, str]:
    """What counts for nothing once torch is imported."""
    early = ("OMP_", "MKL_", "TORCH_LOGS", "PYTHON")
    return {k: v for k, v in environment.items() if k.startswith(early) and k != "PYTHONPATH"}


@cache
def _server(user: int, *options: str) -> subprocess.Popen[str]:
    """That of a process, which a fork of it does not share."""
    own = ("TRITON_INTERPRET", "PYTHONPATH")
    environment = {k: v for k, v in _ENVIRONMENT.items() if k not in own and not k.startswith("FASTOPS_")}
    server = subprocess.Popen(
        [sys.executable, *options, __file__],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    atexit.register(server.communicate)  # which ends it
    return server


def _serve() -> None:
    """Fork for each line of standard input; say how the process ended."""
    import torch  # noqa: F401

    for line in iter(sys.stdin.readline, ""):
        child = os.fork()
        if not child:
            _run(**json.loads(line))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(status, flush=True)


def _run(words: list[str], cwd: str, env: dict[str, str], outputs: list[str]) -> NoReturn:
    """Be the process: returns into the interpreter's own end. One that hangs is ended."""
    signal.alarm(600)
    for number, path in enumerate((os.devnull, *outputs)):
        file = os.open(path, os.O_RDWR | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.orig_argv = [sys.executable, *words]
    kind = words[0] if words[0] in ("-c", "-m") else ""
    name, sys.argv = (words[1], [kind, *words[2:]]) if kind else (words[0], words)
    first = {"-c": "", "-m": cwd, "": str(Path(cwd, name).resolve().parent)}[kind]
    sys.path[:1] = [first, *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
    if kind == "-m":
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        module = sys.modules["__main__"] = ModuleType("__main__")
        text, where = (name, "<string>") if kind else (Path(name).read_text(), str(Path(cwd, name)))
        if not kind:
            module.__file__ = where
        exec(compile(text, where, "exec", dont_inherit=True), vars(module))
    raise SystemExit


if __name__ == "__main__":
    _serve()
