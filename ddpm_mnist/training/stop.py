"""Signals that ask a run to stop."""

import os
import signal
import threading
from contextlib import suppress

import torch
from accelerate import Accelerator

from .hardware import launched

# With these, systems ask a job to end or announce that they will: Ctrl-C, kill, a closed terminal or Windows console,
# batch systems (Slurm and SGE announce by USR1 or USR2), a limit on CPU time. Not all systems have all of them.
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK", "SIGUSR1", "SIGUSR2", "SIGXCPU")


class StopSignal:
    """Signals ask the loop to stop after the present update; a second Ctrl-C stops at once."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator, self.signum, self.calls = accelerator, 0, 0
        self.previous: dict[int, object] = {}  # handlers to restore
        self.launcher = os.getppid() if launched() else None

    def listen(self) -> None:
        """Handle the signals, in the main thread, as Python requires. An ignored SIGHUP (nohup) stays ignored."""
        if threading.current_thread() is not threading.main_thread():
            return
        for name in SIGNALS:
            signum = getattr(signal, name, None)
            if signum is None or (name == "SIGHUP" and signal.getsignal(signum) is signal.SIG_IGN):
                continue
            self.previous[signum] = signal.signal(signum, self.receive)

    def restore(self) -> None:
        """Restore the handlers from before `listen`."""
        for signum, handler in self.previous.items():
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)
        self.previous = {}

    def receive(self, signum: int, frame) -> None:
        first, self.signum = self.signum == 0, signum
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if first and os.environ.get("LOCAL_RANK", "0") == "0":
            with suppress(OSError):  # not by print, which may be what the signal interrupted
                os.write(2, b"\nStopping soon; an unfinished run is saved first. Ctrl-C stops at once, unsaved.\n")

    def requested(self) -> bool:
        """Whether to stop; the same in all processes. Also when the launcher ends: Accelerate's forwards no signals."""
        if self.launcher not in (None, os.getppid()):
            self.signum = self.signum or signal.SIGTERM
        if self.accelerator.num_processes == 1:
            return self.signum != 0
        self.calls += 1
        every = 10 if self.accelerator.device.type == "cuda" else 1  # updates between two agreements: a GPU waits
        if self.calls % every:
            return False
        signums = self.accelerator.gather(torch.tensor([self.signum], device=self.accelerator.device))
        agreed = int(signums.max())
        if agreed:  # else a signal may have come meanwhile, for the next agreement
            self.signum = agreed
        return agreed != 0
