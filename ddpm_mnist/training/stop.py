"""Signals that ask a run to stop."""

import signal
import threading

import torch
from accelerate import Accelerator

# With these, systems ask a job to end or announce that they will: Ctrl-C, kill, a closed terminal or Windows console,
# batch systems (Slurm and SGE announce by USR1 or USR2), a limit on CPU time. Not all systems have all of them.
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK", "SIGUSR1", "SIGUSR2", "SIGXCPU")


class StopSignal:
    """Signals ask the loop to stop after the present update; a second Ctrl-C stops at once."""

    EVERY = 10  # updates between two agreements of several processes: each costs a wait for all

    def __init__(self, accelerator: Accelerator):
        self.accelerator, self.signum, self.asked = accelerator, 0, 0
        self.before: dict[int, object] = {}  # handlers to give back

    def listen(self) -> None:
        """Take the signals, in the main thread, where alone it is possible. An ignored SIGHUP (nohup) stays ignored."""
        if threading.current_thread() is not threading.main_thread():
            return
        for name in SIGNALS:
            signum = getattr(signal, name, None)
            if signum is None or (name == "SIGHUP" and signal.getsignal(signum) is signal.SIG_IGN):
                continue
            self.before[signum] = signal.signal(signum, self.receive)

    def give_back(self) -> None:
        """Put the handlers back that were there before."""
        for signum, handler in self.before.items():
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)
        self.before = {}

    def receive(self, signum: int, frame) -> None:
        self.signum = signum
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def requested(self) -> bool:
        """Whether to stop; the same answer in all processes."""
        if self.accelerator.num_processes == 1:
            return self.signum != 0
        self.asked += 1
        if self.asked % self.EVERY:
            return False
        signums = self.accelerator.gather(torch.tensor([self.signum], device=self.accelerator.device))
        self.signum = int(signums.max())
        return self.signum != 0

    @property
    def exit_code(self) -> int:
        return 128 + self.signum if self.signum else 0
