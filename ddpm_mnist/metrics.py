"""Does a conditional model draw the digit that it was asked for? A classifier, trained on the same data, says.

python -m ddpm_mnist.metrics --model ddpm-mnist-conditional --dataset_name PATH_OR_ID --num_images 1000
"""

import json
import sys
import time
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm
from transformers import ResNetConfig, ResNetForImageClassification

from .config import ConfigError, Parser, TrainConfig, opt, run_script
from .data import Images, index_batches, scale


def train_classifier(train: Images, epochs: int = 3, seed: int = 0) -> ResNetForImageClassification:
    """A small ResNet (0.3 M parameters) that reads `[B, C, 28, 28]` in [-1, 1]; deterministic but for the hardware.

    Three epochs of MNIST are enough for 99% of the test split.
    """
    torch.manual_seed(seed)
    config = ResNetConfig(
        num_channels=train.images.shape[1],
        embedding_size=32,
        hidden_sizes=[32, 64, 128],
        depths=[1, 1, 1],
        layer_type="basic",
        num_labels=int(train.labels.max()) + 1,
    )
    classifier = ResNetForImageClassification(config).train()
    batch_size = min(128, len(train))
    steps = epochs * len(train) // batch_size
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    batches = train.batches(index_batches(len(train), seed, 0, batch_size, 1, 0, 1))
    for _ in tqdm(range(steps), desc="training the classifier"):
        images, labels = next(batches)
        F.cross_entropy(classifier(images).logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return classifier.eval()


@torch.no_grad()
def read(classifier: ResNetForImageClassification, images: Tensor) -> tuple[Tensor, Tensor]:
    """Class `[B]` that the classifier reads in images `[B, C, H, W]` in [-1, 1], and how sure it is, 0 to 1 `[B]`."""
    probabilities = torch.cat([classifier(batch).logits.softmax(-1) for batch in images.split(256)])
    confidence, classes = probabilities.max(dim=-1)
    return classes, confidence


@dataclass
class MetricsConfig:
    """The options of `python -m ddpm_mnist.metrics`."""

    model: str = opt("ddpm-mnist-conditional", "Folder of a conditional pipeline, or its Hub id.")
    dataset_name: str | None = opt(None, "What the classifier learns from; as in training.")
    num_images: int = opt(1000, "Samples to read, in equal parts of each class.")
    batch_size: int = opt(100, "How many at a time.")
    scheduler: Literal["ddpm", "ddim", "dpmsolver"] = opt("ddim", "Sampler.")
    num_inference_steps: int | None = opt(None, "Steps. Default: that of `generate`.")
    guidance_scale: float = opt(2.0, "How far towards the class.")
    seed: int = opt(0, "Of samples and classifier.")


def measure(config: MetricsConfig) -> dict:
    """The share of samples that are read as the class asked for, and what is behind it."""
    from .data import load_data
    from .generate import STEPS, GenerateConfig, load_model
    from .sampling import sample_images

    settings = GenerateConfig(model=config.model, scheduler=config.scheduler)
    unet, scheduler, null_class_label = load_model(settings)
    if unet.config.num_class_embeds is None:
        raise ConfigError(f"--model {config.model}: is unconditional; name one that draws classes")
    classes = unet.config.num_class_embeds - (null_class_label is not None)
    data_config = TrainConfig(dataset_name=config.dataset_name, num_validation_samples=10**9)
    data_config.unet = {"in_channels": unet.config.in_channels, "sample_size": unet.config.sample_size}
    data = load_data(data_config)
    started = time.perf_counter()
    classifier = train_classifier(data.train, seed=config.seed)
    classifier_seconds = time.perf_counter() - started
    test_classes, _ = read(classifier, scale(data.test.images))

    steps = config.num_inference_steps or STEPS[config.scheduler]
    asked = torch.arange(config.num_images) % classes
    samples = []
    for numbers in tqdm(torch.arange(config.num_images).split(config.batch_size), desc="sampling"):
        guidance = (config.guidance_scale, null_class_label)
        labels = asked[numbers].to(unet.device)
        samples.append(sample_images(unet, scheduler, config.seed, numbers.tolist(), steps, labels, *guidance))
    classes_read, confidence = read(classifier, torch.cat(samples).clamp(-1, 1).cpu())
    right = classes_read == asked
    return {
        "read_as_asked": right.float().mean().item(),
        "read_as_asked_by_class": [right[asked == c].float().mean().item() for c in range(classes)],
        "confidence_over_0.9": (confidence > 0.9).float().mean().item(),
        "num_images": config.num_images,
        "sampler": f"{config.scheduler}, {steps} steps, guidance {config.guidance_scale}, seed {config.seed}",
        "classifier_test_accuracy": (test_classes == data.test.labels).float().mean().item(),
        "classifier_seconds": classifier_seconds,
    }


def main() -> int:
    parser = Parser(MetricsConfig, description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--debug", action="store_true", help="Show the traceback of an error.")
    config, _ = parser.parse_args_into_dataclasses(look_for_args_file=False)
    print(json.dumps(measure(config), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
