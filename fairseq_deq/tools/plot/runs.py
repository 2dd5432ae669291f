"""The curves of training runs, as fairseq-train wrote them: a log in JSON, or TensorBoard events."""

from __future__ import annotations

import json
import math
import struct
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ...errors import OptionError
from ..command import progress
from .settings import Settings

Curve = dict[int, float]  # value by number of updates

# Of these alone a figure would not be a picture of a training run.
ESSENTIAL = (
    *("loss", "ppl", "f_nfe", "b_nfe", "f_res", "b_res", "f_conv", "b_conv", "f_lane_nfe", "b_lane_nfe"),
)
COLUMNS = (*ESSENTIAL, "step_time", "sradius", "jac", "lr", "gnorm")


@dataclass
class Run:
    """The curves of a training run.

    Args:
        name: for the legend.
        train: curves of training, by column.
        valid: curves of validation, by column.
        settings: what is known of its options.
    """

    name: str
    train: dict[str, Curve] = field(default_factory=lambda: defaultdict(dict))
    valid: dict[str, Curve] = field(default_factory=lambda: defaultdict(dict))
    settings: Settings = field(default_factory=Settings)

    def add(self, part: str, update: int, column: str, value: float) -> None:
        """Add a point; a later one replaces an earlier one, as a resumed run repeats updates.

        Args:
            part: "train" or "valid".
            update: number of updates done.
            column: name in the log. From `ups` (updates per second) the step time is taken.
            value: the value; what is not finite is not drawn.
        """
        if column == "ups" and value > 0:
            column, value = "step_time", 1 / value
        if column in COLUMNS and math.isfinite(value):
            (self.train if part == "train" else self.valid)[column][update] = value

    def finish(self, epochs: Run) -> Run:
        """Put right what a log says in its own way.

        Args:
            epochs: the ends of epochs, which serve where there is nothing finer.
        Returns:
            the run.
        """
        self.train = self.train or epochs.train
        # The learning rate that is logged after an update is that of the next one; after the last one, such
        # as the end of a cosine, it is never used.
        rates = self.train.pop("lr", {})
        last = max(rates, default=0)
        used = {update + 1: rate for update, rate in rates.items() if update < last}
        if used:
            self.train["lr"] = used
        return self

    @property
    def switch(self) -> float | None:
        """Updates after which the stack became an equilibrium; None where there is no such change."""
        solved = self.train.get("f_nfe", {})
        before = [update for update in self.train.get("loss", {}) if solved and update < min(solved)]
        if not before:
            return None
        steps = self.settings.values.get("pretrain_steps", 0)
        return steps if max(before) <= steps < min(solved) else max(before)


def read_json_log(path: Path, name: str) -> Run:
    """Read a log file of fairseq-train --log-format json.

    Args:
        path: the file.
        name: for the legend.

    Returns:
        The run. Lines that are not JSON objects (fairseq writes its configuration and messages among
        them, and a kill leaves half a line) are passed over.

    Raises:
        OptionError: the file cannot be read, or holds no line of progress.
    """
    run, epochs = Run(name), Run(name)
    found = False
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise OptionError(f"The log {path} cannot be read: {error.strerror}.") from None
    for line in text.split("\n"):
        run.settings.read_configuration(line)
        # The console's lines have the time and the place in the code before the object.
        start = line.find('{"epoch"')
        if start < 0:
            continue
        try:
            stats = json.loads(line[start:])
        except ValueError:
            continue
        found = True
        for key, shown in stats.items():
            try:
                value = float(shown)
            except (TypeError, ValueError):
                continue
            # train_inner lines have bare names, those at the end of an epoch `train_` and `valid_`.
            prefix = next((prefix for prefix in ("train_", "valid_") if f"{prefix}num_updates" in stats), "")
            update = int(float(stats.get(f"{prefix}num_updates", 0)))
            column = key.removeprefix(prefix)
            if prefix == "valid_":
                run.add("valid", update, column, value)
            else:
                (epochs if prefix else run).add("train", update, column, value)
    if not found:
        raise OptionError(
            f"The file {path} has no line of progress; fairseq-train writes them with "
            f"--log-format json --log-file FILE."
        )
    return run.finish(epochs)


def read_events(path: Path) -> Iterator[tuple[float, int, str, float | str]]:
    """Read the scalars and the texts of a TensorBoard event file.

    Args:
        path: the file: records of length (8 bytes), its checksum (4), an event, and its checksum (4).

    Yields:
        Wall time, number of updates, tag and value. A record cut short by a kill, or spoilt, ends the file.
    """
    from google.protobuf.message import DecodeError
    from tensorboardX.proto.event_pb2 import Event

    data = path.read_bytes()
    position = 0
    while position + 12 <= len(data):
        (length,) = struct.unpack_from("<Q", data, position)
        start = position + 12
        if start + length > len(data):
            return
        try:
            event = Event.FromString(data[start : start + length])
        except DecodeError:
            return
        for value in event.summary.value:
            kind = value.WhichOneof("value")
            if kind == "simple_value":
                yield event.wall_time, event.step, value.tag, value.simple_value
            elif kind == "tensor" and value.tensor.string_val:
                text = value.tensor.string_val[0].decode("utf-8", "replace")
                yield event.wall_time, event.step, value.tag.partition("/")[0], text
        position = start + length + 4


def read_tensorboard(path: Path, name: str) -> Run:
    """Read a folder of fairseq-train --tensorboard-logdir.

    Args:
        path: the folder; fairseq writes into its folders `train_inner` (progress), `train` (ends of epochs)
            and one for each validation text.
        name: for the legend.

    Returns:
        The run.

    Raises:
        OptionError: there is no event file in it.
    """
    files = sorted(path.rglob("events.out.tfevents.*"))
    if not files:
        raise OptionError(
            f"The folder {path} has no TensorBoard events; fairseq-train writes them with "
            f"--tensorboard-logdir DIR."
        )
    try:
        points = sorted(
            (wall, file.parent.name, step, tag, value)
            for file in progress(files, path.name)
            for wall, step, tag, value in read_events(file)
        )
    except ImportError:
        raise OptionError(
            "TensorBoard events are read with tensorboardX, which is not installed; "
            "type: pip install tensorboardX"
        ) from None
    run, epochs = Run(name), Run(name)
    for _, folder, step, tag, value in points:
        if isinstance(value, str):
            if tag == "sys.argv":
                run.settings.read_command(value)
        elif folder in ("train", "train_inner"):
            (run if folder == "train_inner" else epochs).add("train", step, tag, value)
        else:
            run.add("valid", step, tag, value)
    return run.finish(epochs)


def read_run(argument: str) -> Run:
    """Read what a RUN on the command line stands for.

    Args:
        argument: a path, or NAME=path.

    Returns:
        The run.

    Raises:
        OptionError: it does not exist, or has none of the columns that are drawn.
    """
    name, equals, given = argument.partition("=")
    if not equals or Path(argument).exists():
        name, given = "", argument
    path = Path(given)
    if path.is_dir():
        run = read_tensorboard(path, name or path.resolve().name)
    elif path.exists():
        run = read_json_log(path, name or path.stem)
    else:
        raise OptionError(f"The run {path} does not exist.")
    if not any(column in part for part in (run.train, run.valid) for column in ESSENTIAL):
        raise OptionError(f"The run {path} has none of the columns {', '.join(ESSENTIAL)}.")
    return run
