"""How a run is asked to stop: by a signal, or by the end of its launcher."""

import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from ..errors import CareHubError

LAUNCHERS = {"accelerate", "accelerate-launch", "accelerate.commands.accelerate_cli"}
LAUNCHERS |= {"accelerate.commands.launch", "torchrun", "torch.distributed.run", "torch.distributed.launch"}
PASSED_ON = ("TORCHELASTIC_RUN_ID", "SLURM_STEP_ID")  # torchrun and srun pass on what a process may have got
PASSED_ON_SECONDS = 1.0  # within this time


class Preempted(CareHubError):
    """The run was asked to stop; what it has trained is saved, and it can be resumed."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h


def launcher() -> int | None:
    """The process id of the parent if it is a launcher of Accelerate or torch: they may die without a word.

    Any other parent, as a shell, may end before the training does.
    """
    with suppress(psutil.Error):
        parent = psutil.Process(os.getppid())
        if LAUNCHERS & {Path(word).name for word in parent.cmdline()[:6]}:
            return parent.pid
    return None


PROCESS, LAUNCHER = os.getpid(), launcher()


class Preemption:
    """Within it SIGTERM, SIGINT, SIGHUP and the signal named `also` ask the run to stop; a second one ends
    the process at once.

    SIGHUP stays ignored where it was, as under nohup; but what comes from torchrun, which then
    kills, counts. In another thread than the main one only the launcher's end is noticed.
    """

    def __init__(self, also: str):
        self.signals = {signal.SIGTERM, signal.SIGINT, signal.Signals[also.upper()]}
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN or "TORCHELASTIC_RUN_ID" in os.environ:
            self.signals.add(signal.SIGHUP)
        self.first: float | None = None  # when the first signal came
        self.error: Preempted | None = None
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "Preemption":
        with suppress(ValueError):  # not the main thread
            for number in self.signals:
                self.before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: it was not one of Python's
        if kind is KeyboardInterrupt and self.error:
            raise self.error from None

    def asked(self) -> bool:
        """Whether this process was asked to stop."""
        orphaned = os.getpid() == PROCESS and LAUNCHER not in (None, os.getppid())
        return orphaned or self.first is not None

    def raise_from_now_on(self, error: Preempted) -> None:
        """End with `error` as soon as this process is asked to stop: all is saved."""
        self.error = error
        if self.asked():
            raise error

    def _ask(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if self.first is None:
            self.first = now
            if self.error:
                raise KeyboardInterrupt  # which nothing takes for a broken image
        elif now - self.first > PASSED_ON_SECONDS or not any(name in os.environ for name in PASSED_ON):
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
