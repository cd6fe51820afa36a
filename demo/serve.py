"""Show a trained model at work, in a browser on this machine; or make a static Space of it.

    python demo/serve.py --model ddpm-mnist
    python demo/serve.py --model ddpm-mnist --space_dir my-space --hub_model_id USER/ddpm-mnist

Exports the model to ONNX and serves the page beside this file on the loopback address, where no other machine can see
it. The page itself draws: sampler.js is Algorithm 2. A Space is a folder with the same files, for `hf upload`.
"""

import os
import sys
import webbrowser
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

DEMO = Path(__file__).resolve().parent
sys.path.append(str(DEMO.parent))  # `python demo/serve.py` looks in demo/ alone
from onnx_model import export_onnx  # noqa: E402

from ddpm_mnist.errors import ConfigError, file_problem  # noqa: E402
from ddpm_mnist.hub.repo import check_repo_id  # noqa: E402
from ddpm_mnist.options import opt, read_options, run_script  # noqa: E402
from ddpm_mnist.record import ONNX_FILE  # noqa: E402

PAGE = ("index.html", "page.css", "page.js", "film.js", "pad.js", "schedule.js", "worker.js", "model.js", "sampler.js")
MODEL = ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json", ONNX_FILE)  # what the page reads
TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css", ".js": "text/javascript", ".json": "application/json"}


@dataclass(frozen=True)
class ServeConfig:
    """What to show"""

    model: str = opt("ddpm-mnist", "The output_dir of a finished training run.", path=True)
    port: int = opt(7860, "Port; 0: one that is free.", at_least=0, at_most=65535)
    no_browser: bool = opt(False, "Print the address, and open no browser.")
    space_dir: str | None = opt(None, "Write a static Space into this folder, and serve nothing.", path=True)
    hub_model_id: str | None = opt(None, "The model that the Space names and links: USER/NAME.")


def page_files(model_dir: Path, name: str) -> dict[str, bytes]:
    """Path -> content of the page of a model that was exported to ONNX, which any server of files can serve."""
    files = {"model.txt": f"{name}\n".encode()} | {file: (DEMO / file).read_bytes() for file in PAGE}
    return files | {f"model/{file}": (model_dir / file).read_bytes() for file in MODEL}


def write_space(model_dir: Path, folder: Path, model_id: str | None) -> None:
    """Write the page, the model and the Space's README.md, and print how to upload them.

    ConfigError: there is no model to link, or the folder holds other files.
    """
    check_repo_id(model_id)
    if problem := file_problem(folder / "README.md"):
        raise ConfigError(f"--space_dir {folder}: {problem}")
    if folder.exists() and any(folder.iterdir()) and not (folder / "model.txt").is_file():
        raise ConfigError(f"--space_dir {folder}: holds other files; name another")
    export_onnx(model_dir)
    card = (DEMO / "space_template.md").read_text(encoding="utf-8")
    card = card.replace("MODEL_ID", model_id).replace("MODEL_NAME", model_id.split("/")[-1])
    for path, content in (page_files(model_dir, model_id) | {"README.md": card.encode()}).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    print(f"Wrote {folder}. To make the Space:\n")
    print(f"hf repos create USER/NAME --type space --sdk static\nhf upload USER/NAME {folder} . --type space")


class Handler(BaseHTTPRequestHandler):
    """Serves `files`, path -> content, and nothing else."""

    files: dict[str, bytes] = {}

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].lstrip("/") or "index.html"
        content = self.files.get(path)
        self.send_response(200 if content is not None else 404)
        self.send_header("Content-Type", TYPES.get(Path(path).suffix, "application/octet-stream"))
        self.send_header("Content-Length", str(len(content or b"")))
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")  # with both, the page computes in threads
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Cache-Control", "no-cache")  # the model may be trained on
        self.end_headers()
        self.wfile.write(content or b"")

    def log_message(self, *_) -> None:
        pass


def main(arguments: list[str]) -> int:
    config = read_options(ServeConfig, arguments, __doc__.splitlines()[0])
    folder = Path(config.model)
    if not (folder / "model_index.json").is_file():
        raise ConfigError(f"--model {folder}: holds no model_index.json; name the output_dir of a finished run")
    if config.space_dir is not None:
        write_space(folder, Path(config.space_dir), config.hub_model_id)
        return 0
    print(f"Exporting {folder} to ONNX ...")
    export_onnx(folder)
    Handler.files = page_files(folder, folder.resolve().name)
    ThreadingHTTPServer.allow_reuse_address = os.name != "nt"  # Windows would share a port that is in use
    try:
        server = ThreadingHTTPServer(("127.0.0.1", config.port), Handler)
    except OSError as error:
        raise ConfigError(f"--port {config.port}: {error.strerror}; name another, or 0 for one that is free") from None
    address = f"http://127.0.0.1:{server.server_port}/"
    print(f"{address} shows it, until Ctrl+C.", flush=True)
    if not config.no_browser:
        Thread(target=webbrowser.open, args=[address], daemon=True).start()  # a browser in the terminal waits
    server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
