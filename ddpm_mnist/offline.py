"""One quick question to the Hub, without the minutes of retries that its client takes when nothing answers."""

from collections.abc import Iterator
from contextlib import contextmanager

from .errors import ConfigError


def hub_status(repo_id: str, repo_type: str, timeout: float = 5.0) -> str:
    """ "found", "missing" (or private) or "unreachable": what one request says of a "dataset" or "model" repo."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    if constants.HF_HUB_OFFLINE:
        return "unreachable"
    try:
        HfApi().repo_info(repo_id, repo_type=repo_type, timeout=timeout)
    except (RepositoryNotFoundError, GatedRepoError, HFValidationError):
        return "missing"
    except Exception:  # whatever the network library of the day raises
        return "unreachable"
    return "found"


@contextmanager
def hub_or_cache(repo_id: str, repo_type: str, missing: str) -> Iterator[None]:
    """While the context lasts, `huggingface_hub`, and `datasets` and `diffusers` on it, load from the Hub, or, where
    it does not answer, from the cache or fail at once. Afterwards the Hub is asked again: it may be back by then.

    ConfigError: the Hub has no such repo; `missing` is the message.
    """
    import datasets
    from huggingface_hub import constants

    status = hub_status(repo_id, repo_type)
    if status == "missing":
        raise ConfigError(missing)
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    if status == "unreachable":
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before
