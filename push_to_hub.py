"""Put a trained model on the Hugging Face Hub, with a model card.

    python push_to_hub.py --model_dir ddpm-mnist --hub_model_id USER/ddpm-mnist

The token comes from `hf auth login`, HF_TOKEN or --token_file. Run again with nothing changed, it makes no commit; cut
off half-way, run it again.
"""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from ddpm_mnist.config import opt, read_options, run_script


@dataclass
class PushConfig:
    """The options of `push_to_hub.py`; those of the same name in diffusers' examples mean the same."""

    hub_model_id: str = opt("", "The repo: USER/NAME. Needed.")
    model_dir: str = opt("ddpm-mnist", "The output_dir of a finished training run.")
    private: bool = opt(False, "Make a new repo private; refuse to push to one that is public.")
    revision: str | None = opt(None, "Branch; made if missing. Default: main.")
    create_pr: bool = opt(False, "Open a pull request instead of committing.")
    commit_message: str = opt("Upload DDPM", "Message of the commit.")
    license: str = opt("mit", "License of the weights, for the model card.")
    token_file: str | None = opt(None, "File that holds the token.")
    include_checkpoints: bool = opt(False, "Also checkpoints, with the optimizer's state.")
    tensorboard: bool = opt(False, "Also the logs of TensorBoard.")
    dry_run: bool = opt(False, "Validate and list, and send nothing.")


def main() -> int:
    config = read_options(PushConfig, __doc__.splitlines()[0])
    from ddpm_mnist.push import push_model

    options = asdict(config)
    push_model(Path(options.pop("model_dir")), options.pop("hub_model_id"), **options)
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
