"""Put a trained model on the Hugging Face Hub, with a model card.

    python push_to_hub.py --model_dir ddpm-mnist --hub_model_id USER/ddpm-mnist

With `--space_id USER/NAME`, also a Space: a page on which anyone can watch the model draw. The token comes from
`hf auth login` or HF_TOKEN. Run again with nothing changed, it makes no commit; if it was interrupted,
run it again.
"""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from ddpm_mnist.hub.push import push_model
from ddpm_mnist.options import opt, read_options, run_script


@dataclass(frozen=True)
class PushConfig:
    """What to push"""

    hub_model_id: str = opt("", "The repo: USER/NAME. Needed.")
    model_dir: str = opt("ddpm-mnist", "The output_dir of a finished training run.", path=True)
    space_id: str | None = opt(None, "Also a Space that shows the model, by the page in demo/: USER/NAME.")
    private: bool = opt(False, "Make a new repo private; refuse to push to one that is public.")
    revision: str | None = opt(None, "Branch; made if missing. Default: main.")
    create_pr: bool = opt(False, "Open a pull request instead of committing.")
    commit_message: str = opt("Upload DDPM", "Message of the commit.")
    license: str = opt("mit", "License of the weights, for the model card.")
    include_checkpoints: bool = opt(False, "Also checkpoints, with the optimizer's state.")
    tensorboard: bool = opt(False, "Also the logs of TensorBoard.")
    dry_run: bool = opt(False, "Validate and list, and send nothing.")


def main(arguments: list[str]) -> int:
    config = read_options(PushConfig, arguments, __doc__.splitlines()[0])
    options = asdict(config)
    push_model(Path(options.pop("model_dir")), options.pop("hub_model_id"), **options)
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
