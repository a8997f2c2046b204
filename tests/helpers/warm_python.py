"""Fork Python processes from a server that has already imported torch: milliseconds instead of seconds a process.

`start` is `subprocess.Popen` for this interpreter (`-m MODULE`, `-c CODE`, `SCRIPT`). The server is this file, run as a
script: one thread, no process group, MODULES imported. It forks twice, so that the kernel makes the process a child of
the one that called `start`, its nearest ancestor that is a "child subreaper". A torchrun that runs in such a process
forks a server of its own for its workers (docs/decisions/0016-tests.md has the alternatives). Variables that are read
once, when a new interpreter starts (`PYTHON*`, `OMP_NUM_THREADS`), have no effect.
"""

import atexit
import ctypes
import importlib
import json
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ADDRESS, MARK = "TEST_WARM_PYTHON", "TEST_MARK"
"""Environment variables: the path of the server's socket; the name in `/proc/PID/comm`, which forks inherit."""
MODULES = (
    *("torch", "torchvision", "timm", "torch.distributed.run", "torch.nn.parallel", "torch.utils.tensorboard"),
    *("transformers.models.vit.modeling_vit", "transformers.models.vit_mae.modeling_vit_mae", "matplotlib.figure"),
    *("matplotlib.backends.backend_agg", "fer_dist.train", "fer_dist.evaluate", "fer_dist.predict"),
)
CHILD_SUBREAPER, PARENT_DEATH_SIGNAL = 36, 1
prctl = ctypes.CDLL(None).prctl
_kept: list[Any] = []
"""Sockets that a fork has closed by number: their finalizers would close what has these numbers later."""


class WarmProcess(subprocess.Popen[str]):
    """A forked process: a child of this one, which `Popen` has not started."""

    def __init__(self, pid: int) -> None:
        self.pid, self.returncode, self.args = pid, None, "warm Python"
        self.stdin = self.stdout = self.stderr = None
        self._child_created, self._waitpid_lock, self._sigint_wait_secs = True, threading.Lock(), 0.25


def start(arguments: Sequence[str], files: list[int], cwd: Path, environment: Mapping[str, str]) -> WarmProcess:
    """Fork a process that does what `python ARGUMENTS` does; files: descriptors of its stdin, stdout and stderr."""
    while not Path(os.environ[ADDRESS]).exists():  # the server's imports take seconds
        time.sleep(0.01)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(os.environ[ADDRESS])
        job = json.dumps([list(arguments), str(cwd), dict(environment)])
        socket.send_fds(connection, [job.encode()], files)
        return WarmProcess(int(connection.recv(64)))


def serve(path: str) -> list[Any]:
    """Fork a process for each connection; return in the forked processes only, with their job."""
    prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(f"{path}.new")
    listener.listen(64)
    Path(f"{path}.new").rename(path)
    while True:
        connection, _ = listener.accept()
        message, files, *_ = socket.recv_fds(connection, 1 << 20, 3)
        if (between := os.fork()) == 0:
            between = os.getpid()
            if os.fork():
                os._exit(0)
            while os.getppid() == between:
                time.sleep(0.0005)
            connection.send(str(os.getpid()).encode())
            for number, file in enumerate(files):
                os.dup2(file, number)
            _kept.extend((listener, connection))
            os.closerange(3, 4096)
            return json.loads(message)  # type: ignore[no-any-return]
        os.waitpid(between, 0)
        connection.close()
        for file in files:
            os.close(file)


def run(arguments: list[str], cwd: str, environment: dict[str, str]) -> None:
    """Do what `python ARGUMENTS` does in a new interpreter, and end the process."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    os.setsid()  # as torchrun's workers
    Path("/proc/self/comm").write_text(environment.get(MARK, "python"))
    random.seed()
    sys.modules["numpy"].random.seed()
    code: Any = 0
    try:
        interpret([argument for argument in arguments if argument != "-u"])
    except SystemExit as end:
        code = sys.stderr.write(f"{end.code}\n") and 1 if isinstance(end.code, str) else end.code
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


def interpret(arguments: list[str]) -> None:
    """Run a module, a string of code or a script as `__main__`."""
    if arguments[0] == "-m":
        if arguments[1] in ("torch.distributed.run", "fer_dist.launch"):
            fork_workers()
        sys.argv, sys.path[0] = arguments[1:], str(Path.cwd())
        sys.modules.pop(arguments[1], None)  # a new interpreter has it as __main__ only
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif arguments[0] == "-c":
        main = sys.modules["__main__"] = type(sys)("__main__")
        sys.argv, sys.path[0] = ["-c", *arguments[2:]], ""
        exec(compile(arguments[1], "<string>", "exec"), vars(main))
    else:
        sys.argv, sys.path[0] = arguments, str(Path(arguments[0]).resolve().parent)
        runpy.run_path(arguments[0], run_name="__main__")


def fork_workers() -> None:
    """Make torchrun fork its workers from a server instead of starting interpreters."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import SubprocessHandler

    def popen(handler: Any, args: tuple[str, ...], env: dict[str, str]) -> WarmProcess:
        files = [handler._stdout.fileno() if handler._stdout else 1, handler._stderr.fileno() if handler._stderr else 2]
        return start(args[1:], [0, *files], Path.cwd(), env)

    path = os.environ[ADDRESS] = f"{os.environ[ADDRESS]}-{os.getpid()}"
    prctl(CHILD_SUBREAPER, 1)
    if os.fork() == 0:
        run(*serve(path))
    SubprocessHandler._popen = popen  # type: ignore[assignment, method-assign]


if __name__ == "__main__":
    for name in MODULES:
        importlib.import_module(name)
    if len(list(Path("/proc/self/task").iterdir())) > 1:
        sys.exit("error: an imported module has started a thread, which a fork lacks")
    run(*serve(sys.argv[1]))
