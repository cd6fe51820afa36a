"""A small classifier, trained on the same data, that scores samples."""

import hashlib
import json
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm
from transformers import ResNetConfig, ResNetForImageClassification

from ..errors import ConfigError
from ..images.batches import Images, index_batches, scale
from ..images.dataset import Data
from ..randomness import seeded_generator

VERSION = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]  # a classifier of other code is not read


def train_classifier(train: Images, steps: int = 1400, seed: int = 0) -> ResNetForImageClassification:
    """Train a small ResNet (0.3 M parameters) on `[B, C, H, W]` in [-1, 1]; deterministic on the same hardware.

    1,400 steps of 128 images (three epochs of MNIST) reach an accuracy of 99% on the test split.
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
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    batches = train.batches(index_batches(len(train), seed, 0, min(128, len(train)), 1, 0, 1))
    for _ in tqdm(range(steps), desc="training the classifier"):
        images, labels = next(batches)
        F.cross_entropy(classifier(images).logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return classifier.eval()


@torch.no_grad()
def read(classifier: ResNetForImageClassification, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Classify images, `[N, C, H, W]` uint8.

    Returns:
        The predicted class, `[N]`; its probability, 0 to 1, `[N]`; the features before the last layer, `[N, 128]`.
    """
    classes, confidences, features = [], [], []
    for batch in pixels.split(500):
        pooled = classifier.resnet(scale(batch)).pooler_output
        confidence, read_as = classifier.classifier(pooled).softmax(-1).max(dim=-1)
        classes.append(read_as)
        confidences.append(confidence)
        features.append(pooled.flatten(1))
    return torch.cat(classes), torch.cat(confidences), torch.cat(features)


def accuracy(classifier: ResNetForImageClassification, images: Images) -> float:
    """The share of images whose predicted class is their label."""
    return (read(classifier, images.images)[0] == images.labels).float().mean().item()


def labelled(data: Data) -> tuple[Images, Images]:
    """Images to learn classes from, and others to be judged by: of the train split where the test labels are hidden."""
    if data.test.labels is not None:
        return data.train, data.test
    order = torch.randperm(len(data.train), generator=seeded_generator(0, "subset"))
    cut = max(1, len(order) // 20)
    return tuple(Images(data.train.images[rows], data.train.labels[rows]) for rows in (order[cut:], order[:cut]))


def cache_folder(fingerprint: str, steps: int, seed: int) -> Path:
    """The folder in which the classifier for these images is cached between evaluations."""
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface")).expanduser()
    key = hashlib.sha256(f"{VERSION}, {fingerprint}, {steps} steps, seed {seed}".encode()).hexdigest()[:16]
    return home / "ddpm-mnist" / f"classifier-{key}"


def get_classifier(
    data: Data, steps: int, seed: int, min_accuracy: float
) -> tuple[ResNetForImageClassification, float]:
    """The classifier, and its accuracy on the test split. Trained once per dataset, then read from the cache.

    Raises:
        ConfigError: the images are not in memory, or the accuracy is below `min_accuracy`.
    """
    if not isinstance(data.train, Images):
        raise ConfigError(
            "--max_resident_gb: the training images are more than that, and evaluation needs them in memory; raise it"
        )
    train, test = labelled(data)
    folder = cache_folder(f"{data.fingerprint}, {len(train)} of them", steps, seed)
    if (folder / "config.json").is_file():
        classifier = ResNetForImageClassification.from_pretrained(folder, use_safetensors=True).eval()
    else:
        classifier = train_classifier(train, steps, seed)
        draft = folder.with_name(f".{folder.name}.{os.getpid()}")  # renamed when complete, as checkpoints are
        classifier.save_pretrained(draft)
        about = json.dumps({"name": data.name, "fingerprint": data.fingerprint})
        (draft / "dataset.json").write_text(about, encoding="utf-8")
        if folder.exists():
            folder.rename(draft / "incomplete")
        draft.rename(folder)
    share = accuracy(classifier, test)
    if share < min_accuracy:
        raise ConfigError(
            f"--min_classifier_accuracy {min_accuracy}: the classifier is right on {share:.2%} of the test images; "
            "what it says of samples would be worth little. Give --classifier_steps more, or accept less"
        )
    return classifier, share
