"""Runs of train_ddpm_mnist.py one after the other, in these processes: the arguments of each, as JSON."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch.distributed  # noqa: E402

import train_ddpm_mnist  # noqa: E402
from ddpm_mnist.options import run_script  # noqa: E402
from ddpm_mnist.training import run  # noqa: E402

run.HELD_OUT_IMAGES = 32  # as in conftest.py

# One group for all: a second one in the same store may meet the addresses that the first has left there.
torch.distributed.init_process_group("gloo")
torch.distributed.destroy_process_group = lambda group=None: None
for arguments in json.loads(sys.argv[1]):
    if code := run_script(lambda _, given=arguments: train_ddpm_mnist.main(given)):
        sys.exit(code)
