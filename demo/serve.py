"""Show a trained model at work, in a browser on this machine.

    python demo/serve.py --model ddpm-mnist

Exports the model to ONNX and serves the page beside this file on the loopback address, where no other machine can see
it. The page itself draws: sampler.js is Algorithm 2. `push_to_hub.py --space_id` makes a Space of the same files.
"""

import os
import sys
import webbrowser
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))  # `python demo/serve.py` looks in demo/ alone
from ddpm_mnist.errors import ConfigError  # noqa: E402
from ddpm_mnist.hub.onnx import export_onnx  # noqa: E402
from ddpm_mnist.hub.space import page_files  # noqa: E402
from ddpm_mnist.options import opt, read_options, run_script  # noqa: E402

TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css", ".js": "text/javascript", ".json": "application/json"}


@dataclass(frozen=True)
class ServeConfig:
    """What to show"""

    model: str = opt("ddpm-mnist", "The output_dir of a finished training run.", path=True)
    port: int = opt(7860, "Port; 0: one that is free.", at_least=0, at_most=65535)
    no_browser: bool = opt(False, "Print the address, and open no browser.")


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
        webbrowser.open(address)
    server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
