"""Signals that ask a run to stop."""

import signal

import torch
from accelerate import Accelerator


class StopSignal:
    """Ctrl-C and SIGTERM ask the loop to stop after the present update; a second Ctrl-C stops at once."""

    EVERY = 10  # updates between two agreements of several processes: each costs a wait for all

    def __init__(self, accelerator: Accelerator):
        self.accelerator, self.signum, self.asked = accelerator, 0, 0

    def listen(self) -> None:
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self.receive)

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
