"""A small classifier, trained on the same data, that scores samples."""

import hashlib
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from huggingface_hub import constants
from torch import Tensor
from tqdm.auto import tqdm
from transformers import ResNetConfig, ResNetForImageClassification

from ..errors import ConfigError
from ..images.batches import Images, index_batches, scale
from ..images.dataset import Data, load_data
from ..loading import Model
from ..randomness import seeded_generator
from ..record import rename

VERSION = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]  # other code trains another classifier


class Judge(NamedTuple):
    """What samples are compared with: the images of the model's dataset, and a classifier that is trained on them.

    `unseen`: the training images held out from the classifier, which is overconfident on those that it learned from.
    """

    data: Data
    unseen: Images
    classifier: ResNetForImageClassification
    accuracy: float  # on the test split
    features: Tensor  # of the test split, `[N, 128]`
    seed: int  # of subsets


def train_classifier(train: Images, steps: int = 1400, seed: int = 0) -> ResNetForImageClassification:
    """Train a small ResNet (0.3 M parameters) on `[B, C, H, W]` in [-1, 1]; deterministic on the same hardware.

    1,400 steps of 128 images (three epochs of MNIST) reach an accuracy of 99% on the test split.
    """
    torch.manual_seed(seed)
    sizes = {"num_channels": train.images.shape[1], "embedding_size": 32, "hidden_sizes": [32, 64, 128]}
    num_labels = int(train.labels.max()) + 1
    config = ResNetConfig(**sizes, depths=[1, 1, 1], layer_type="basic", num_labels=num_labels)
    classifier = ResNetForImageClassification(config).train()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    batches = train.batches(index_batches(len(train), seed, 0, min(128, len(train))))
    for _ in tqdm(range(steps), desc="training the classifier"):
        images, labels = next(batches)
        F.cross_entropy(classifier(images).logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return classifier.eval()


@torch.no_grad()
def classify(classifier: ResNetForImageClassification, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of images `[N, C, H, W]` uint8: predicted classes and their probabilities, `[N]`, and features, `[N, 128]`."""
    results = []
    for batch in pixels.split(500):
        pooled = classifier.resnet(scale(batch)).pooler_output
        confidences, classes = classifier.classifier(pooled).softmax(-1).max(dim=-1)
        results.append((classes, confidences, pooled.flatten(1)))
    return tuple(torch.cat(parts) for parts in zip(*results))


def load_judge(model: Model, config) -> Judge:
    """Load the data; the classifier is trained once per dataset, and then loaded from the cache.

    ConfigError: the data cannot be loaded, or is too little.
    """
    data = load_data(config, *model.shape[:2], model.num_classes, with_labels=True)
    if min(len(data.train), len(data.test)) < 10:
        raise ConfigError(f"--dataset_name {data.name}: an evaluation needs 10 training and 10 test images, or more")
    steps, seed, count = config.classifier_steps, config.seed, max(len(data.train) // 10, 5)
    key = hashlib.sha256(f"{VERSION}, {data.fingerprint}, {steps} steps, seed {seed}".encode()).hexdigest()[:16]
    folder = Path(constants.HF_HOME) / "ddpm-mnist" / f"classifier-{key}"
    order = torch.randperm(len(data.train), generator=seeded_generator(seed, "subset"))
    seen, unseen = (Images(data.train.images[x], data.train.labels[x]) for x in (order[count:], order[:count]))
    try:
        classifier = ResNetForImageClassification.from_pretrained(folder, use_safetensors=True, local_files_only=True)
    except Exception:  # there is none, or it is damaged
        classifier = train_classifier(seen, steps, seed)
        draft = folder.with_name(f".{folder.name}.{os.getpid()}")  # renamed when complete, as checkpoints are
        classifier.save_pretrained(draft)
        shutil.rmtree(folder, ignore_errors=True)  # of another evaluation, at the same time
        rename(draft, folder)
    classes, _, features = classify(classifier, data.test.images)
    accuracy = (classes == data.test.labels).float().mean().item()
    return Judge(data, unseen, classifier, accuracy, features, seed)
