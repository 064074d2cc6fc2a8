"""Writes manifests while a training saves, and deletes old checkpoints once newer ones stand.

Megatron moves its tracker when a save is done, an asynchronous one too. `notice`, called between
steps, sees the tracker move; a thread then writes the manifest while training goes on, first with
the sizes alone, so that the checkpoint is complete, then with the checksums.
"""

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from megatron_infoentropy.checkpoints.folder import (
    TRACKER,
    begin_record,
    path_of,
    read_tracker,
    with_manifest,
)
from megatron_infoentropy.checkpoints.manifest import NAME, write_manifest

DELETED = "deleted_"  # the name of a checkpoint that is being deleted starts with this


class CheckpointKeeper:
    """Of one --save folder, on one rank; leaving the `with` block waits for what is under way.

    keep_last: so many complete checkpoints stay; None keeps all.
    say: told one line where a manifest could not be written or an old checkpoint not be deleted.
    """

    def __init__(self, save: Path, keep_last: int | None, say: Callable[[str], object]) -> None:
        self._save, self._keep_last, self._say = save, keep_last, say
        begin_record(save)
        self._seen = self._moment()
        self._thread = ThreadPoolExecutor(1)

    def notice(self) -> None:
        """Have the manifest of a checkpoint written that was saved since the last call."""
        moment = self._moment()
        if moment == self._seen:
            return
        self._seen = moment
        name = read_tracker(self._save)
        if name:
            self._thread.submit(self._complete, name)

    def __enter__(self) -> "CheckpointKeeper":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.notice()
        self._thread.shutdown(wait=True)

    def _moment(self) -> tuple[int, int] | None:
        """Tells two writings of the tracker apart, of the same iteration too."""
        try:
            stat = (self._save / TRACKER).stat()
        except FileNotFoundError:
            return None
        return stat.st_mtime_ns, stat.st_size

    def _complete(self, name: str) -> None:
        folder = path_of(self._save, name)
        failure = "could not be written, so this checkpoint does not count as complete"
        try:
            write_manifest(folder, checksums=False)
            failure = "holds sizes without checksums"
            write_manifest(folder)
        except OSError as error:
            self._say(f"WARNING: {folder / NAME} {failure}: {error}")
            return
        if self._keep_last is not None and name.isdigit():
            self._delete_old(int(name), self._keep_last)

    def _delete_old(self, newest: int, keep_last: int) -> None:
        complete = [it for it in with_manifest(self._save) if it <= newest]
        for left in self._save.glob(f"{DELETED}iter_*"):
            self._delete(left)
        for iteration in complete[:-keep_last]:
            self._delete(path_of(self._save, str(iteration)))

    def _delete(self, folder: Path) -> None:
        try:
            # What is half deleted must not look like a checkpoint, and be found again later.
            if not folder.name.startswith(DELETED):
                folder = folder.rename(folder.with_name(f"{DELETED}{folder.name}"))
            shutil.rmtree(folder)
        except OSError as error:
            self._say(f"WARNING: {folder} could not be deleted: {error}")
