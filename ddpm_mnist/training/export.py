"""The end of a run: the pipeline folder, what was measured, and the push."""

import time

from ..errors import ConfigError, first_line
from ..hub.export import export_pipeline
from ..hub.push import push_model
from .log import write_results
from .setup import Run
from .validation import write_card_pictures


def export(run: Run) -> None:
    """Write the trained model as a diffusers pipeline, with its results; push it where `push_to_hub` says so."""
    if not run.accelerator.is_main_process:
        return
    config, accelerator = run.config, run.accelerator
    weights = run.averaged_weights()
    try:
        export_pipeline(run.bare_unet, run.scheduler, run.output_dir, weights, config.null_class_label)
        seconds = time.perf_counter() - run.started
        write_card_pictures(run)
    except Exception as error:  # a full disk, in the words of several libraries
        raise ConfigError(
            f"--output_dir {run.output_dir}: the pipeline cannot be written ({first_line(error)}); make room, then"
            f" --resume_from_checkpoint latest; {run.last_good()}"
        ) from error
    steps = run.step - run.first_step
    if steps:
        write_results(run.output_dir, accelerator, run.data, run.parameters, run.log.last, steps, seconds)
        figures = {k: v for k, v in run.log.last.items() if k.startswith("held_out") or k == "loss"}
        run.log.write_final(run.step, figures | {"minutes": seconds / 60, "parameters": run.parameters})
    accelerator.print(f"Saved to {run.output_dir}: {run.parameters:,} parameters, {seconds / 60:.1f} minutes.")
    if config.push_to_hub:
        if run.pusher is not None:
            run.pusher.wait()
        private, token_file = config.hub_private_repo, config.token_file
        push_model(run.output_dir, config.hub_model_id, private=private, token_file=token_file)
