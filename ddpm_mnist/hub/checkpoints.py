"""Pushing the checkpoints of a run while it trains, for machines whose disk is lost at the end of a job."""

from pathlib import Path
from threading import Thread

from ..errors import ConfigError
from .push import published_config
from .repo import explain, make_repo, read_token

LONGEST_WAIT = 600.0  # seconds, for the last push, at the end of a run


class CheckpointPusher:
    """Pushes one checkpoint at a time, in a thread, so that training goes on; where the Hub is slow, only the newest.

    A push that fails is said in a line and ends nothing: the next checkpoint is tried again.
    """

    def __init__(self, repo_id: str, private: bool = False, say=print):
        from huggingface_hub import HfApi

        self.api, self.repo_id, self.private, self.say = HfApi(token=read_token()), repo_id, private, say
        self.thread: Thread | None = None
        self.next: Path | None = None  # the newest checkpoint, until its push begins
        self.pushed: set[str] = set()  # checkpoints of this run that are on the Hub

    def push(self, checkpoint: Path) -> None:
        """Push a checkpoint folder, with the settings and the log beside it, as soon as the push before it is done."""
        self.next = checkpoint
        if self.thread is None or not self.thread.is_alive():
            self.thread = Thread(target=self.work, daemon=True)
            self.thread.start()

    def wait(self) -> None:
        """Until the newest checkpoint is pushed, or has failed."""
        if self.thread is not None:
            self.thread.join(LONGEST_WAIT)
            if not self.thread.is_alive():
                self.work()  # what came as the thread ended

    def work(self) -> None:
        while self.next is not None:
            checkpoint, self.next = self.next, None
            self.upload(checkpoint)

    def upload(self, checkpoint: Path) -> None:
        """One commit: the checkpoint comes, and those that the run has deleted since go."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        run = checkpoint.parent
        try:
            self.repo_id = make_repo(self.api, self.repo_id, self.private, None)
            if not checkpoint.is_dir():
                raise ConfigError("newer ones have replaced it")
            added = {path.relative_to(run): path for path in checkpoint.rglob("*") if path.is_file()}
            added[Path("train_config.yaml")] = published_config(run)
            for name in ("metrics.jsonl", "logs/run_id"):  # as they are now: they may grow
                if (run / name).is_file():
                    added[Path(name)] = (run / name).read_bytes()
            gone = {name for name in self.pushed if not (run / name).is_dir()}
            operations = [CommitOperationAdd(path.as_posix(), content) for path, content in sorted(added.items())]
            operations += [CommitOperationDelete(f"{name}/", is_folder=True) for name in sorted(gone)]
            self.api.create_commit(self.repo_id, operations, commit_message=f"Add {checkpoint.name}")
            self.pushed = self.pushed - gone | {checkpoint.name}
        except Exception as error:  # of the client, its network library, the disk
            reason = error if isinstance(error, ConfigError) else explain(error, self.repo_id)
            self.say(f"{checkpoint.name} was not pushed ({reason}). The run goes on and tries the next one.")
