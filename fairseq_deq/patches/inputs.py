"""Clear messages for data and checkpoints that are missing, empty, damaged, or of another model."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from typing import Any

from ..errors import OptionError

OTHER_SIZES = "is this the dictionary it was trained with, and does --model-overrides keep its sizes?"
OTHER_SCOPE = (
    "what it has learned of its solves is of another size with this --solver-scope; to do without it, add "
    "'preconditioner_rank': 0, 'learned_start': False to --model-overrides"
)


def explaining_missing_dictionary(add_from_file: Callable[..., None]) -> Callable[..., None]:
    """Say which folder has no dictionary, and which tool makes one."""

    def wrapper(self: Any, f: Any) -> None:
        try:
            add_from_file(self, f)
        except FileNotFoundError:
            folder, name = os.path.split(str(f))
            if name != "dict.txt":
                raise OptionError(f"there is no dictionary {f}") from None
            state = "has no dict.txt" if os.path.isdir(folder or ".") else "does not exist"
            if not os.path.isabs(folder):  # hydra runs in a folder of its own
                state += f" in {os.getcwd()}"
            raise OptionError(
                f"the data folder {folder or '.'} {state}; give the --destdir of fairseq-preprocess"
            ) from None

    return wrapper


def explaining_empty_split(load_indexed_dataset: Callable[..., Any]) -> Callable[..., Any]:
    """Say which text is empty; fairseq says "cannot mmap an empty file"."""

    def wrapper(path: str, *args: Any, **kwargs: Any) -> Any:
        try:
            dataset = load_indexed_dataset(path, *args, **kwargs)
            is_empty = dataset is not None and len(dataset) == 0
        except ValueError as error:
            if "empty file" not in str(error):
                raise
            is_empty = True
        if is_empty:
            folder, split = os.path.split(path)
            raise OptionError(
                f"the text {split!r} in {folder} is empty; give fairseq-preprocess a text with words in it"
            )
        return dataset

    return wrapper


def explaining_damage(load: Callable[..., Any]) -> Callable[..., Any]:
    """Say which checkpoint is damaged, and what to do instead."""

    def wrapper(path: str, *args: Any, **kwargs: Any) -> Any:
        try:
            return load(path, *args, **kwargs)
        except (FileNotFoundError, PermissionError, IsADirectoryError, OptionError):
            raise
        except (EOFError, OSError, RuntimeError, KeyError, TypeError, pickle.UnpicklingError) as error:
            if "nsupported" in str(error):  # torch names the class that it does not load, and what to do
                raise
            raise OptionError(
                f"{path} is not a whole fairseq checkpoint (a copy or a disk may have cut it short): "
                "go on from another one with --restore-file, or evaluate another one with --path"
            ) from error

    return wrapper


def explaining_other_weights(load: Callable[..., Any]) -> Callable[..., Any]:
    """Say how the weights of a checkpoint differ from the model.

    Also accept several checkpoints with colons between, as an ensemble.
    """

    def wrapper(filenames: Any, *args: Any, **kwargs: Any) -> Any:
        filenames = [path for name in filenames for path in _paths(str(name))]
        try:
            return load(filenames, *args, **kwargs)
        except KeyError as error:
            if error.args != ("model",):
                raise
            raise OptionError(
                f"{', '.join(filenames)} has no weights: it is no checkpoint of a model"
            ) from None
        except OSError as error:
            if "Model file not found" not in str(error):
                raise
            raise OptionError(f"--path: there is no checkpoint {str(error).partition(': ')[2]}") from None
        except RuntimeError as error:
            if "Neither args nor cfg" in str(error):
                raise OptionError(
                    f"{', '.join(filenames)} does not say which model it holds: it is no checkpoint "
                    "of fairseq"
                ) from None
            if "loading state_dict" not in str(error):
                raise
            difference = _first_difference(error)
            raise OptionError(
                f"the weights in {', '.join(filenames)} do not fit the model ({difference}): "
                + (OTHER_SCOPE if ".knowledge." in difference else OTHER_SIZES)
            ) from error

    return wrapper


def _paths(name: str) -> list[str]:
    """The checkpoints of an ensemble; fairseq-eval-lm reads their names as one name."""
    return [name] if os.path.exists(name) or os.pathsep not in name else name.split(os.pathsep)


def requiring_restore_file(load_checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse to train from scratch if `--restore-file` names a file that does not exist."""

    def wrapper(cfg: Any, trainer: Any, *args: Any, **kwargs: Any) -> Any:
        from fairseq.file_io import PathManager

        name = cfg.restore_file
        path = name.replace(".pt", (trainer.checkpoint_suffix or "") + ".pt")
        if name != "checkpoint_last.pt" and not PathManager.exists(path):
            raise OptionError(
                f"--restore-file: there is no checkpoint {path} (looked up from the working directory, "
                "not from --save-dir)"
            )
        return load_checkpoint(cfg, trainer, *args, **kwargs)

    return wrapper


def explaining_other_model(load_checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """Say how the model of a checkpoint differs from the one that the options ask for."""

    def wrapper(self: Any, filename: str, *args: Any, **kwargs: Any) -> Any:
        try:
            return load_checkpoint(self, filename, *args, **kwargs)
        except OptionError:
            raise
        except AssertionError as error:
            if "--reset-optimizer" not in str(error):
                raise
            raise OptionError(f"{filename}: {error}") from error
        except Exception as error:
            if not str(error).startswith("Cannot load model parameters"):
                raise
            reason = error.__context__
            if isinstance(reason, OptionError):
                raise reason from None
            raise OptionError(
                f"{filename} holds another model than the options ask for ({_first_difference(reason)}); "
                "give the options it was trained with, or another --save-dir or --restore-file"
            ) from error

    return wrapper


def _first_difference(error: BaseException | None) -> str:
    """The first difference that torch's error names."""
    lines = [line.strip().rstrip(".") for line in str(error).splitlines()]
    # torch's first line names only the class, and the second says what differs
    line = lines[1] if len(lines) > 1 else "".join(lines) or type(error).__name__
    names = line.split(", ")
    return f"{names[0]} and {len(names) - 1} more" if names[0].startswith(("Missing", "Unexpected")) else line
