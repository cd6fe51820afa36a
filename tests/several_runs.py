"""Runs of train_ddpm_mnist.py one after the other, in these processes: the arguments of each, as JSON."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import train_ddpm_mnist  # noqa: E402
from ddpm_mnist.options import run_script  # noqa: E402

for arguments in json.loads(sys.argv[1]):
    if code := run_script(lambda _, given=arguments: train_ddpm_mnist.main(given)):
        sys.exit(code)
