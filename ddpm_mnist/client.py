"""One quick question to the Hub, without the minutes of retries that its client takes when nothing answers."""


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


def go_offline() -> None:
    """Make `huggingface_hub`, and `datasets` and `diffusers` on it, use the cache or fail at once."""
    import datasets
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
