"""Devices, threads, processes, precision and trackers, as the launcher and the options set them."""

import ctypes
import os
import sys

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import ProjectConfiguration

from ..errors import ConfigError, first_line
from ..loading import default_device
from .config import TrainConfig

UNSUPPORTED = ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG")  # ACCELERATE_USE_...


def start_accelerator(config: TrainConfig) -> Accelerator:
    """Set up the hardware, and an Accelerator by the run's options, whatever its environment variables say.

    ConfigError: the launcher asks for what this script does not support, or Accelerate cannot start.
    """
    for name in UNSUPPORTED:
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() in ("true", "1"):
            raise ConfigError(f"ACCELERATE_USE_{name}: this script knows plain data parallelism only; unset it")
    check_gpus()
    precision, why = resolve_mixed_precision(config.mixed_precision)
    try:
        accelerator = Accelerator(
            mixed_precision=precision,
            log_with=tracker_names(config.report_to),
            project_config=ProjectConfiguration(config.output_dir, logging_dir=os.path.join(config.output_dir, "logs")),
        )
    except Exception as error:  # whatever the environment makes Accelerate load
        advice = f"check the launcher's config, and --mixed_precision {precision}"
        raise ConfigError(f"Accelerate cannot start ({first_line(error)}); {advice}") from error
    if accelerator.distributed_type == "XLA":
        raise ConfigError("torch_xla is installed, and this script knows no TPU: set USE_TORCH_XLA=false")
    if precision == "fp16" and accelerator.device.type == "cpu":
        raise ConfigError("--mixed_precision fp16: needs a GPU; use bf16 or no")
    accelerator.gradient_accumulation_steps = config.gradient_accumulation_steps  # an environment variable cannot win
    world_size = os.environ.get("WORLD_SIZE", "1")
    if world_size != str(accelerator.num_processes):
        raise ConfigError(
            f"WORLD_SIZE is {world_size}, but the processes are not connected: no GPU was found. Set "
            "ACCELERATE_USE_CPU=true for several processes on a CPU, or start one"
        )
    use_hardware(accelerator)
    if why:
        accelerator.print(f"Mixed precision {precision}: {why}.")
    return accelerator


def launched() -> bool:
    """Whether `accelerate launch` or torchrun started this process. Each sets a variable that no user does."""
    return not os.environ.keys().isdisjoint(("ACCELERATE_DYNAMO_MODE", "TORCHELASTIC_RUN_ID"))


def local_processes() -> int:
    """How many processes share this machine."""
    text = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, int(text)) if text.isdecimal() else 1


def check_gpus() -> None:
    """ConfigError: there are GPUs, but fewer than processes. Accelerate's barrier needs one each, on the CPU too."""
    processes, gpus = local_processes(), torch.cuda.device_count()
    if 0 < gpus < processes:
        advice = f"start {gpus}, or, for processes on the CPU, set ACCELERATE_USE_CPU=true and CUDA_VISIBLE_DEVICES=-1"
        raise ConfigError(f"LOCAL_WORLD_SIZE is {processes}, and this machine has {gpus} GPU(s); {advice}")


def use_hardware(accelerator: Accelerator) -> None:
    """Use all cores that a launcher withheld; on a GPU, allow TF32 and use deterministic convolutions.

    Without the latter, float32 runs on an H100 were not repeatable; with it, this was not measured. `accelerate
    launch` and torchrun set OMP_NUM_THREADS=1, which wastes cores; a user's own value, without a launcher, is obeyed.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.deterministic = True
    if accelerator.device.type != "cpu":
        return
    keep_freed_memory()
    if launched() and os.environ.get("OMP_NUM_THREADS") == "1":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // local_processes()))


def keep_freed_memory() -> None:
    """Tell glibc not to give freed memory back to the kernel: a training step frees and requests the same hundreds of
    megabytes, and getting them page by page again costs a CPU 7% of its time. Other systems stay as they are."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    mallopt = getattr(libc, "mallopt", lambda *_: False)
    if mallopt(-3, 2**30) or mallopt(-3, 2**25):  # M_MMAP_THRESHOLD; an older glibc takes at most 2**25
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def tracker_names(report_to: str) -> str | None:
    """`--report_to` for Accelerator. ConfigError: the package is not installed."""
    if report_to not in ("none", "all", *map(str, get_available_trackers())):
        raise ConfigError(f"--report_to {report_to}: not installed; `pip install {report_to}`, or --report_to none")
    return None if report_to == "none" else report_to


def resolve_mixed_precision(value: str) -> tuple[str, str]:
    """The precision for Accelerator, "no", "fp16" or "bf16", and why, if nobody named it.

    "auto" is fp16 or bf16 if `accelerate launch` was told so, and otherwise bf16 if the hardware computes in it. A "no"
    of `accelerate launch` is also its default, so the run prints what it does.
    """
    told = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if value != "auto":
        return value, ""
    if told != "no":
        return told, "as accelerate was told; --mixed_precision sets another"
    if computes_in_bf16():
        return "bf16", "this hardware computes in it; --mixed_precision no turns it off"
    return "no", ""


def computes_in_bf16() -> bool:
    """Whether bfloat16 is computed by the hardware, and not emulated."""
    if default_device().type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()  # no public function; older versions: False
