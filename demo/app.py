"""A page that shows a DDPM at work: the noise becomes a picture, step by step.

    pip install -r demo/requirements.txt
    python demo/app.py --model ddpm-mnist

The model is a folder or an id on the Hub, conditional or not. `drawing.py` draws, by the sampler of `ddpm_mnist/`; what
moves in the browser is in three scripts: `film.js` shows the steps, `pad.js` is written on, `schedule.js` adds noise to
an image. `push_to_hub.py --space_id USER/NAME` makes a Space of this folder and what it imports of `ddpm_mnist/`.
"""

import argparse
import logging
import os
import sys
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr
from drawing import (
    DEFAULT_STEPS,
    IN_TURN,
    MAX_GUIDANCE,
    MAX_IMAGES,
    MAX_SEED,
    MAX_TRIES,
    NO_LABEL,
    SAMPLERS,
    Model,
    Refusal,
    Settings,
    check,
    draw,
    load_model,
    rewrite,
)

HERE = Path(__file__).resolve().parent
MAX_WAITING = 20  # visitors in the queue; one drawing is made at a time

FILM = """<div class="film">
<p class="caption" role="status">WAITING</p>
<div class="tiles"></div>
<div class="scrub"><button type="button" class="play" aria-label="Play the steps">&#9654;</button>
<input type="range" min="0" max="0" value="0" aria-label="Step: from the noise to the picture"></div>
<p class="links"><a class="save" href="#" role="button">Save as PNG</a>
<a class="link" href="#">Link to this picture</a></p></div>"""
WAITING = """Write a digit and see what the model makes of it: the drawing is scaled and centred as MNIST's digits are,
noised to timestep t, and denoised, several times with different noise. The larger t, the freer the model."""
PAD = """<div class="pad">
<div class="square"><canvas width="280" height="280" tabindex="0" role="img"
 aria-label="Write here. With the keyboard: arrows move the pen, space lowers and lifts it."></canvas>
<span class="ring" hidden></span></div>
<p><button type="button" class="clear">Clear</button>
<small>With the keyboard: arrows move the pen, space lowers and lifts it.</small></p></div>"""
SCHEDULE = """<div class="schedule">
<label>Timestep t = <output></output><input type="range" min="0" value="0" aria-label="Timestep t"></label>
<div class="row"><figure><canvas class="image" role="img" aria-label="The image at t"></canvas>
<figcaption class="sum"></figcaption></figure>
<figure><svg class="plot" viewBox="0 0 320 200" role="img" aria-label="Shares of image and noise over t"></svg>
<figcaption><span class="signal">&#9632; x&#8320;</span> <span class="noise">&#9632; noise &epsilon;</span></figcaption>
</figure></div><p class="words"></p></div>"""


def part(template: str, script: str, **options) -> gr.HTML:
    """A piece of the page that a script beside this file brings to life."""
    code = (HERE / script).read_text(encoding="utf-8")
    return gr.HTML(html_template=template, js_on_load=code, apply_default_css=False, **options)


@contextmanager
def errors_on_the_page():
    """What cannot be done becomes a message on the page, a gr.Error; a traceback goes to the log only."""
    try:
        yield
    except Refusal as refusal:
        raise gr.Error(str(refusal), duration=10, print_exception=False) from None
    except Exception:
        logging.exception("A drawing failed.")
        message = "This failed on the server, and its log says why. Try other settings."
        raise gr.Error(message, duration=10, print_exception=False) from None


def make_page(model: Model) -> gr.Blocks:
    """The page of a model. Its first picture is drawn here, so that a model that cannot draw fails before it opens."""
    conditional, guided = model.classes is not None, model.null_class_label is not None
    labels = [str(label) for label in range(model.classes or 0)]
    choose = gr.Radio if len(labels) < 12 else gr.Dropdown
    defaults = Settings(count=min(len(labels) or 10, 10), steps=min(DEFAULT_STEPS["ddpm"], model.timesteps))
    *_, first = draw(model, defaults)

    title = "Watch diffusion draw"
    which = f"[{model.name}]({model.card}) (its model card)" if model.card else f"{model.name}, a local folder"
    with gr.Blocks(title=f"{title}: {model.name}") as page:
        gr.Markdown(f"# {title}\nA diffusion model starts from noise and removes it in small steps. Model: {which}.")
        with gr.Tab("Draw"), gr.Row():
            with gr.Column(scale=2, min_width=300):
                drawn_label = choose([IN_TURN, *labels], value=IN_TURN, label="Label", visible=conditional)
                count = gr.Slider(1, MAX_IMAGES, defaults.count, step=1, label="How many", elem_id="count")
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, elem_id="seed")
                with gr.Row():
                    go = gr.Button("Draw", variant="primary", min_width=80, elem_id="draw")
                    another = gr.Button("Next seed", min_width=80, elem_id="another")
                    stop = gr.Button("Stop", min_width=60, elem_id="stop")
                with gr.Accordion("Sampler, steps and guidance", open=False):
                    sampler = gr.Radio(list(SAMPLERS), value=defaults.sampler, label="Sampler")
                    steps = gr.Slider(1, model.timesteps, defaults.steps, step=1, label="Steps", elem_id="steps")
                    guidance = gr.Slider(
                        *(0, MAX_GUIDANCE, defaults.guidance),
                        step=0.5,
                        label="Guidance",
                        info="1 is none; more makes the images plainer and more alike.",
                        visible=conditional and guided,
                    )
            with gr.Column(scale=5, min_width=300):
                drawn = part(FILM.replace("WAITING", ""), "film.js", value=first, elem_id="drawn")
        writable = model.shape[0] == 1 and model.shape[1] == model.shape[2]
        with gr.Tab("Write one", visible=writable), gr.Row():
            with gr.Column(scale=2, min_width=300):
                pad = part(PAD, "pad.js", elem_id="pad")
                write = gr.Button("Noise and denoise", variant="primary", elem_id="rewrite")
                until = gr.Slider(0, model.timesteps - 1, model.timesteps * 2 // 5, step=1, label="Noise it to t")
                names = [*([NO_LABEL] if guided or not labels else []), *labels]
                info = "What the model is told; with a label it turns the drawing into that digit."
                label = choose(names, value=names[0], label="Label", info=info, visible=conditional)
                tries = gr.Slider(1, MAX_TRIES, 4, step=1, label="How many times", elem_id="tries")
            with gr.Column(scale=5, min_width=300):
                rewritten = part(FILM.replace("WAITING", WAITING), "film.js", elem_id="rewritten")
        with gr.Tab("The schedule"):
            alphas_cumprod = [round(float(a), 6) for a in model.scheduler.alphas_cumprod]
            part(SCHEDULE, "schedule.js", value={"alphas_cumprod": alphas_cumprod}, elem_id="schedule")

        # One drawing at a time, for all visitors together.
        private = {"api_visibility": "private"}
        slow = {"concurrency_limit": 1, "concurrency_id": "unet", "show_progress": "minimal", **private}
        quick = {"queue": False, "show_progress": "hidden", **private}
        queued = quick | {"queue": True, "concurrency_limit": None}  # only the queue brings messages to the page
        settings = [drawn_label, count, guidance, sampler, steps, seed]

        def on_draw(*values):
            with errors_on_the_page():
                yield from draw(model, Settings(*values))

        def on_rewrite(*values):
            with errors_on_the_page():
                yield from rewrite(model, *values)

        def linked(request: gr.Request) -> dict[str, str]:
            """The settings in the page's address."""
            return {name: request.query_params[name] for name in Settings._fields if name in request.query_params}

        def on_open(request: gr.Request):
            given = linked(request)  # without any, the controls stay as they are: the visitor may be quicker
            with errors_on_the_page():
                return check(model, defaults._replace(**given)) if given else gr.skip()

        def on_opened(request: gr.Request, *values):
            yield from on_draw(*values) if linked(request) else [gr.skip()]

        drawings = [
            go.click(on_draw, settings, drawn, **slow),
            another.click(lambda seed: (int(seed or 0) + 1) % MAX_SEED, seed, seed, **quick).success(
                on_draw, settings, drawn, **slow
            ),
            page.load(on_open, None, settings, **queued).success(on_opened, settings, drawn, **slow),
            write.click(on_rewrite, [pad, until, label, tries, seed], rewritten, **slow),
        ]
        stop.click(None, cancels=drawings)
        sampler.input(lambda name: min(DEFAULT_STEPS[name], model.timesteps), sampler, steps, **quick)
    return page.queue(max_size=MAX_WAITING, default_concurrency_limit=1)


def default_model() -> str:
    """The model if none is named: DDPM_MODEL's, or the one that the push wrote beside this file."""
    file = HERE / "model.txt"
    written = file.read_text(encoding="utf-8").strip() if file.is_file() else "ddpm-mnist"
    return os.environ.get("DDPM_MODEL") or written


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", default=default_model(), help="Folder of a pipeline, or Hub id. (default: %(default)s)"
    )
    parser.add_argument("--port", type=int, help="Default: the first that is free from 7860 on.")
    arguments = parser.parse_args()
    try:
        page = make_page(load_model(os.path.expanduser(arguments.model)))
    except Exception as error:  # of diffusers, safetensors, the Hub's client and the disk
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        advice = "name the folder of a finished training run, or a model on the Hub"
        print(f"error: --model {arguments.model}: cannot be shown ({reason}); {advice}", file=sys.stderr)
        return 2
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # none from outside
    theme = gr.themes.Default(primary_hue="indigo", **fonts)
    look = {"theme": theme, "css_paths": HERE / "page.css", "footer_links": ["gradio"]}
    page.launch(server_port=arguments.port, ssr_mode=False, run_history=False, **look)
    return 0


if __name__ == "__main__":
    sys.exit(main())
