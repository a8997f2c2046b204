"""`Watch`: signals to stop, a launcher that is gone, and ranks that come no further.

A handler only sets a flag; nothing is saved inside of it. The ranks agree on the flag after each
step. A thread stands by for what the main thread cannot see while it waits for another rank
inside of torch: signals reach it through a file descriptor, which the interpreter writes to even then.
"""

import contextlib
import faulthandler
import os
import selectors
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self, TypeVar

from fer_dist.config import RunConfig
from fer_dist.errors import EXIT_RANK_LOST, Stopped, UserError
from fer_dist.world import World, launcher

T = TypeVar("T")

LOOK_S = 0.25
"""How often the thread looks."""
SUSPENDED_S = 5.0
"""A thread that has not looked for so long was stopped itself, with all of its process."""
LINGER_S = 1.0
"""A rank that wrote its stacks stays so long: the others look up to LOOK_S later, and would die of its going first."""
LAST_STEP_S, LAST_STEP_FACTOR = 10.0, 3.0
"""A rank that was told to stop waits for the end of its step this long, or so many times its longest step so far."""


def stop_signals(names: str) -> dict[int, str]:
    """Numbers and names of `run.stop_signals`.

    Raises:
        UserError: a name is none of a signal that can be caught.
    """
    found: dict[int, str] = {}
    if names.lower() == "none":
        return found
    for name in (part.strip().upper() for part in names.split(",")):
        number = signal.Signals.__members__.get(name if name.startswith("SIG") else f"SIG{name}")
        if number is None or number in (signal.SIGKILL, signal.SIGSTOP):
            raise UserError(
                f"run.stop_signals has {name!r}, expected names of signals that can be caught",
                "--run.stop_signals SIGTERM,SIGUSR1, or none",
            )
        found[int(number)] = number.name
    return found


class Watch:
    """Stands by while a run trains: `with Watch(...) as watch`, and `watch.over(batches)` at every loop.

    Attributes:
        asked: why this rank was asked to stop; empty while it was not.
        place: where the run is, for messages; kept by the trainer.
    """

    def __init__(self, config: RunConfig, world: World, folder: Path) -> None:
        self.asked = ""
        self.place = "before the first step"
        self._signals = stop_signals(config.stop_signals)
        self._timeout = config.timeout_seconds
        self._world = world
        self._stacks = folder / "stacks" / f"rank-{world.rank}.txt"
        self._launched = "RANK" in os.environ
        self._beat = time.monotonic()
        self._longest = 0.0
        self._in_steps = False
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, name="fer_dist watch", daemon=True)
        self._main = threading.current_thread() is threading.main_thread()  # elsewhere signals are not ours to take
        self._before: dict[int, Any] = {}
        self._wakeup_before = -1
        self._woken, self._wake = os.pipe()

    def beat(self) -> None:
        """Say that this rank has come on."""
        now = time.monotonic()
        if self._in_steps:
            self._longest = max(self._longest, now - self._beat)
        self._beat = now

    def over(self, items: Iterable[T], *, until_asked: bool = False) -> Iterator[T]:
        """The items, with a beat before each; optionally none after this rank was asked to stop."""
        for item in items:
            self.beat()
            if until_asked and self.asked:
                return
            yield item
        self.beat()

    def steps(self, batches: Iterable[T]) -> Iterator[T]:
        """The same for training steps: a rank that was told to stop does not wait long for the others in them."""
        self.beat()
        self._in_steps = True
        try:
            yield from self.over(batches)
        finally:
            self._in_steps = False

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Around a save, which may take longer than steps do, and which the other ranks wait for."""
        before, self._in_steps = self._in_steps, False
        yield
        self.beat()
        self._in_steps = before

    def __enter__(self) -> Self:
        if self._main:
            os.set_blocking(self._wake, False)
            self._wakeup_before = signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
            for number in self._signals:
                if signal.getsignal(number) != signal.SIG_IGN:  # nohup, or a shell's background job
                    self._before[number] = signal.signal(number, self._note)
        self.beat()
        self._longest = 0.0
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        if self._main:
            for number, handler in self._before.items():
                # A launcher that sees one rank leave tells the others to go, which are about to.
                signal.signal(number, signal.SIG_IGN if kind is Stopped and self._launched else handler)
            signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._woken)
        os.close(self._wake)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.asked:  # Ctrl-C again: at once
            raise KeyboardInterrupt
        self.asked = self.asked or self._signals[number]

    def _look(self) -> None:
        """The thread: leaves on behalf of a main thread that waits for another rank and cannot."""
        parent = launcher()
        told: float | None = None
        looked = time.monotonic()
        selector = selectors.DefaultSelector()  # select() itself knows the first 1024 files only
        selector.register(self._woken, selectors.EVENT_READ)
        while not self._done.is_set():
            ready = selector.select(LOOK_S)
            now = time.monotonic()
            if (away := now - looked) > SUSPENDED_S:  # a queue that suspends jobs, a container that is paused
                self._beat, told = self._beat + away, told and told + away
            looked = now
            if ready and any(number in self._signals for number in os.read(self._woken, 256)):
                told = told or now
            if self._launched and os.getppid() != parent:  # workers of torchrun outlive it
                told, self.asked = told or now, self.asked or "the end of its launcher"
            if now - self._beat > self._timeout:
                self._stalled()
                self.beat()
            if told and self._in_steps and self._world.size > 1:
                wait = max(LAST_STEP_S, LAST_STEP_FACTOR * self._longest)
                if now - max(told, self._beat) > wait:
                    self._leave(f"told to stop, and waiting for another rank for {wait:.0f} s {self.place}; not saved")
        selector.close()

    def _stalled(self) -> None:
        """Write the stacks of this process, and leave; a process without a launcher is left to its owner."""
        when = f"no progress for {self._timeout:g} s (run.timeout_seconds) {self.place}"
        try:
            self._stacks.parent.mkdir(parents=True, exist_ok=True)
            with self._stacks.open("a") as file:
                file.write(f"rank {self._world.rank}, {time.strftime('%Y-%m-%dT%H:%M:%S%z')}: {when}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            where = f"stacks in {self._stacks}"
        except OSError as error:
            where = f"its stacks cannot be written ({error.strerror})"
        if self._launched:
            time.sleep(LINGER_S)
            self._leave(f"{when}; {where}")
        self._tell(f"{when}; {where}")

    def _tell(self, what: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            print(f"error: rank {self._world.rank}: {what}", file=sys.stderr, flush=True)

    def _leave(self, why: str) -> NoReturn:
        self._tell(why)
        os._exit(EXIT_RANK_LOST)
