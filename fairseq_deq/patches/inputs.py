"""Data and checkpoints that are not there, empty, damaged, or of another model."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from typing import Any

from ..errors import OptionError
from ._patch import replace


def explain_missing_text() -> None:
    """Say which text is missing or empty, and what makes it.

    The fault: a data folder that is not there ends in a FileNotFoundError about its dict.txt, a split that is
    not there in one that does not name the others, and an empty text in "cannot mmap an empty file".
    """
    from fairseq.data import Dictionary, data_utils
    from fairseq.tasks.language_modeling import LanguageModelingTask

    replace(Dictionary, "add_from_file", _explaining_missing_dictionary)
    replace(LanguageModelingTask, "load_dataset", _explaining_missing_split)
    replace(data_utils, "load_indexed_dataset", _explaining_empty_split)


def _explaining_missing_dictionary(add_from_file: Callable[..., None]) -> Callable[..., None]:
    def wrapper(self: Any, f: Any) -> None:
        try:
            add_from_file(self, f)
        except FileNotFoundError:
            folder, name = os.path.split(str(f))
            if name != "dict.txt":
                raise OptionError(f"there is no dictionary {f}") from None
            state = "has no dict.txt" if os.path.isdir(folder or ".") else "does not exist"
            raise OptionError(
                f"the data folder {folder or '.'} {state}; give the --destdir of fairseq-preprocess"
            ) from None

    return wrapper


def _explaining_missing_split(load_dataset: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(self: Any, split: str, *args: Any, **kwargs: Any) -> Any:
        try:
            return load_dataset(self, split, *args, **kwargs)
        except FileNotFoundError as error:
            if "Dataset not found" not in str(error):
                raise
            data = self.args.data
            folder = data.split(os.pathsep)[0]
            names = (name for name in os.listdir(folder) if name.endswith(".idx"))
            there = ", ".join(sorted(name.split(".")[0] for name in names)) or "none"
            raise OptionError(f"the data folder {data} has no text {split!r}; it has: {there}") from None

    return wrapper


def _explaining_empty_split(load_indexed_dataset: Callable[..., Any]) -> Callable[..., Any]:
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


def explain_unusable_checkpoints() -> None:
    """Say what is wrong with a checkpoint that is missing, damaged or of another model.

    The faults: `--restore-file` with a file that is not there trains from scratch without a word of warning;
    a truncated file ends in "Invalid argument" or an EOFError that does not name it; a checkpoint of another
    model ends in a list of tensor names, or in advice without the difference.
    """
    from fairseq import checkpoint_utils
    from fairseq.trainer import Trainer

    replace(checkpoint_utils, "load_checkpoint_to_cpu", _explaining_damage)
    replace(checkpoint_utils, "load_model_ensemble_and_task", _explaining_other_weights)
    replace(checkpoint_utils, "load_checkpoint", _requiring_restore_file)
    replace(Trainer, "load_checkpoint", _explaining_other_model)


def _explaining_damage(load: Callable[..., Any]) -> Callable[..., Any]:
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


def _explaining_other_weights(load: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(filenames: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return load(filenames, *args, **kwargs)
        except OSError as error:
            if "Model file not found" not in str(error):
                raise
            raise OptionError(f"--path: there is no checkpoint {str(error).partition(': ')[2]}") from None
        except RuntimeError as error:
            if "loading state_dict" not in str(error):
                raise
            raise OptionError(
                f"the weights in {', '.join(filenames)} do not fit the model ({_first_difference(error)}): "
                "is this the dictionary it was trained with, and does --model-overrides keep its sizes?"
            ) from error

    return wrapper


def _requiring_restore_file(load_checkpoint: Callable[..., Any]) -> Callable[..., Any]:
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


def _explaining_other_model(load_checkpoint: Callable[..., Any]) -> Callable[..., Any]:
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
    lines = [line.strip().rstrip(".") for line in str(error).splitlines()]
    # torch's first line names the class alone, and the second what differs
    line = lines[1] if len(lines) > 1 else "".join(lines) or type(error).__name__
    names = line.split(", ")
    return f"{names[0]} and {len(names) - 1} more" if names[0].startswith(("Missing", "Unexpected")) else line
