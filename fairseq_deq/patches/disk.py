"""Faults of fairseq in writing checkpoints to the disk."""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import OptionError, RunError

# Parts of torch's messages when a file cannot grow; they do not contain the system's own reason.
_FULL = ("PytorchStreamWriter failed", "unexpected pos", "No space left", "file write failed")


def with_atomic_copy(copy: Callable[..., Any]) -> Callable[..., Any]:
    """Keep checkpoint_last.pt and checkpoint_best.pt whole if the process is killed while it copies them."""
    from fairseq.file_io import PathManager

    def wrapper(src_path: str, dst_path: str, overwrite: bool = False) -> Any:
        # fairseq's own copy replaces a file on disk whatever `overwrite` says, and so does this one.
        if not PathManager.supports_rename(src_path) or not PathManager.supports_rename(dst_path):
            return copy(src_path, dst_path, overwrite=overwrite)
        with _written_beside(dst_path) as temporary:
            shutil.copyfile(src_path, temporary)
        return dst_path

    return wrapper


def with_whole_saves(save: Callable[..., None]) -> Callable[..., None]:
    """Write a checkpoint to a temporary file of this process, and rename it once it is on the disk.

    fairseq retries a failed save twice, 2.5 seconds apart and into the same file, and leaves its `.tmp`.
    """
    from fairseq.file_io import PathManager

    def wrapper(obj: Any, filename: str, async_write: bool = False) -> None:
        if async_write or not PathManager.supports_rename(filename):
            save(obj, filename, async_write)
            return
        import torch

        with _written_beside(filename) as temporary, open(temporary, "wb") as file:
            torch.save(obj, file)

    return wrapper


@contextmanager
def _written_beside(path: str) -> Iterator[str]:
    """A temporary name beside `path`; at the end its file takes the place of `path`, atomically.

    Raises:
        RunError: the file cannot be written; what was at `path` before is still there.
    """
    folder = os.path.dirname(path) or "."
    _remove_stale(path)
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        yield temporary
        _flush_to_disk(temporary)
        os.replace(temporary, path)
        _flush_to_disk(folder)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or next(
            (str(error) for f in _FULL if f in str(error)), None
        )
        if reason is None:
            raise
        raise RunError(
            f"the checkpoint {path} cannot be written ({_reason(reason, folder)}); the checkpoints "
            "saved before "
            "are whole: make room there, or give another --save-dir and go on with --restore-file"
        ) from error
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def _reason(reason: str, folder: str) -> str:
    if any(sign in reason for sign in _FULL):
        free = shutil.disk_usage(folder).free
        return f"no space left: {free / 2**20:.0f} MiB are free"
    return reason[:1].lower() + reason[1:]


def _remove_stale(path: str) -> None:
    """Remove the temporary files that processes which no longer exist have left beside `path`."""
    for name in glob.glob(f"{glob.escape(path)}*.tmp"):
        owner = name[len(path) : -len(".tmp")].strip(".")
        if owner and not owner.isdigit():
            continue
        if owner and int(owner) != os.getpid() and _is_alive(int(owner)):
            continue
        os.remove(name)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _flush_to_disk(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        # Some network file systems cannot flush a folder; the rename itself is still atomic there.
        if not os.path.isdir(path):
            raise
    finally:
        os.close(descriptor)


def with_save_dir_explained(verify: Callable[[str], None]) -> Callable[[str], None]:
    """Say why `--save-dir` cannot be written to, before anything is trained."""

    def wrapper(save_dir: str) -> None:
        try:
            os.makedirs(save_dir, exist_ok=True)
            probe = os.path.join(save_dir, f".{os.getpid()}.tmp")
            with open(probe, "wb"):
                pass
            os.remove(probe)
            for name in os.listdir(save_dir):
                if name.endswith(".tmp") and ".pt" in name:
                    _remove_stale(os.path.join(save_dir, name[: name.rindex(".pt") + 3]))
        except OSError as error:
            raise OptionError(
                f"--save-dir {save_dir} cannot be written to ({error.strerror}): give another folder"
            ) from None

    return wrapper


def after_gathering(save_checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """Before a checkpoint is saved, let the task collect data from all processes (`gather_memory`).

    fairseq asks the task for its state only in the process that saves, where nothing can be collected any
    more.
    """

    def wrapper(cfg: Any, trainer: Any, *args: Any, **kwargs: Any) -> Any:
        if hasattr(trainer.task, "gather_memory") and not cfg.no_save:
            trainer.task.gather_memory(trainer.data_parallel_process_group)
        return save_checkpoint(cfg, trainer, *args, **kwargs)

    return wrapper
