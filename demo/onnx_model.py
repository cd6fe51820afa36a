"""The U-Net as ONNX, for browsers and other runtimes: what the page in this folder runs."""

import logging
import warnings
from pathlib import Path

from ddpm_mnist.errors import ConfigError
from ddpm_mnist.record import ONNX_FILE


def export_onnx(model_dir: Path) -> Path:
    """Write onnx/model.onnx into the folder of a trained model, and return its path. The same weights, the same bytes.

    Inputs: `sample`, float32 `[B, C, H, W]`; `timestep`, int64 `[B]`; and `class_labels`, int64 `[B]`, of a model with
    classes. Output: `out_sample`, float32 `[B, C, H, W]`. B is any number. Stock diffusers' U-Net is exported: the
    repo's own has shortcuts that only PyTorch's CPU kernels gain from.

    ConfigError: `onnx` or `onnxscript` is not installed.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401  torch.onnx needs it
    except ImportError:
        raise ConfigError(f"{ONNX_FILE}: its export needs two packages; pip install onnx onnxscript") from None
    import torch
    from diffusers import UNet2DModel

    unet = UNet2DModel.from_pretrained(model_dir, subfolder="unet", use_safetensors=True).eval()
    size = unet.config.sample_size
    size = (size, size) if isinstance(size, int) else tuple(size)
    inputs = {"sample": torch.zeros(2, unet.config.in_channels, *size), "timestep": torch.zeros(2, dtype=torch.int64)}
    if unet.config.num_class_embeds is not None:
        inputs["class_labels"] = torch.zeros(2, dtype=torch.int64)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            unet,
            kwargs={**inputs, "return_dict": False},
            dynamic_shapes={**{name: {0: torch.export.Dim("batch")} for name in inputs}, "return_dict": None},
            input_names=list(inputs),
            output_names=["out_sample"],
            dynamo=True,
            verbose=False,
        )
    model = program.model_proto
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        part.ClearField("metadata_props")  # stack traces, which hold paths of this machine
    path = Path(model_dir) / ONNX_FILE
    path.parent.mkdir(exist_ok=True)
    onnx.save(model, path)
    return path
