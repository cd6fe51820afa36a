"""Put a trained model on the Hugging Face Hub, with a model card.

    python push_to_hub.py --model_dir ddpm-mnist --hub_model_id USER/ddpm-mnist

The token is from `hf auth login`, HF_TOKEN or HF_TOKEN_PATH. Run again with nothing changed, it makes no commit; if it
was interrupted, run it again.
"""

import sys

from ddpm_mnist.hub.push import PushConfig, push_model
from ddpm_mnist.options import read_options, run_script


def main(arguments: list[str]) -> int:
    """Read the options and push."""
    push_model(read_options(PushConfig, arguments, __doc__.splitlines()[0]))
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
