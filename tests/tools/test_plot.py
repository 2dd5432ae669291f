"""fairseq-deq-plot: what it reads from logs, the picture, and the sentences about bad input."""

import json

import pytest
from matplotlib import image
from tensorboardX import SummaryWriter

from fairseq_deq.tools.plot import command, runs

# Lines as fairseq-train --log-format json writes them: values are strings, and the configuration, which is no
# JSON, is among them. The first line is as on the console, the others as in the log file.
LOG = """\
2026-03-01 10:00:00 | INFO | train_inner | {"epoch": 1, "update": 0.1, "loss": "11.5", "ppl": "2896.31", \
"f_nfe": "3", "f_res": "0.5", "ups": "4", "num_updates": "10", "lr": "0.001", "gnorm": "1.5"}
{'_name': None, 'common': {'_name': None, 'log_interval': 10, 'epoch': 'no JSON'}}
{"epoch": 1, "update": 0.2, "loss": "10", "ppl": "1024", "f_nfe": "12.5", "b_nfe": "9.25", "f_res": "0.02", \
"b_res": "0.03", "f_conv": "0.9", "b_conv": "0.8", "f_lane_nfe": "7.5", "b_lane_nfe": "6.5", \
"jac": "0.7", "ups": "2", "num_updates": "20", "lr": "0.002", "gnorm": "0.9"}
{"epoch": 1, "valid_loss": "9.5", "valid_ppl": "724.08", "valid_f_nfe": "14", "valid_sradius": "0.97", \
"valid_num_updates": "20"}
begin validation on "valid" subset
{"epoch": 1, "update": 0.3, "loss": "inf", "ppl": "nan", "ups": "0", "num_updates": "30"}
{"epoch": 1, "train_loss": "10.75", "train_ppl": "1722.16", "train_num_updates": "30", "train_wall": "60"}
{"epoch": 1, "update": 0.2, "loss": "9.9", "ppl": "955", "num_updates": "20", "lr": "0.002"}
{"epoch": 2, "update": 1.1, "loss": "9.0", "pp"""


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "first.log"
    path.write_text(LOG, encoding="utf-8")
    return path


@pytest.fixture
def events(tmp_path):
    """A folder as fairseq-train --tensorboard-logdir writes it."""
    folder = tmp_path / "tensorboard"
    with SummaryWriter(str(folder / "train_inner")) as writer:
        for step, loss in ((10, 11.0), (20, 9.0), (30, 8.0)):
            writer.add_scalar("loss", loss, step)
            writer.add_scalar("ppl", 2**loss, step)
            writer.add_scalar("ups", 5.0, step)
            writer.add_scalar("f_res", 0.125, step)
    with SummaryWriter(str(folder / "train")) as writer:
        writer.add_text("sys.argv", "fairseq-train")
        writer.add_scalar("loss", 9.5, 30)
    with SummaryWriter(str(folder / "valid")) as writer:
        writer.add_scalar("loss", 8.5, 30)
    return folder


def run(*arguments):
    return command.main([str(argument) for argument in arguments])


def coloured_share(path):
    """The share of pixels that are neither white nor grey: 0 in an empty frame."""
    pixels = image.imread(path)[..., :3]
    return float(((pixels.max(-1) - pixels.min(-1)) > 0.2).mean())


def test_json_log_gives_the_curves(log):
    read = runs.read_json_log(log, "first")
    # The later line for update 20 (of a resumed run) replaces the earlier; what is not finite is left out.
    assert read.train["loss"] == {10: 11.5, 20: 9.9}
    assert read.train["ppl"] == {10: 2896.31, 20: 955.0}
    assert read.train["step_time"] == {10: 0.25, 20: 0.5}
    assert read.train["f_nfe"] == {10: 3.0, 20: 12.5}
    assert read.train["b_lane_nfe"] == {20: 6.5}
    assert dict(read.valid) == {
        "loss": {20: 9.5},
        "ppl": {20: 724.08},
        "f_nfe": {20: 14.0},
        "sradius": {20: 0.97},
    }
    assert "update" not in read.train
    assert "wall" not in read.train


def test_ends_of_epochs_serve_where_there_is_nothing_finer(tmp_path):
    path = tmp_path / "epochs.log"
    path.write_text('{"epoch": 1, "train_loss": "9", "train_num_updates": "7"}\n')
    assert runs.read_json_log(path, "x").train["loss"] == {7: 9.0}


def test_tensorboard_events_give_the_curves(events):
    read = runs.read_tensorboard(events, "x")
    assert read.train["loss"] == {10: 11.0, 20: 9.0, 30: 8.0}
    assert read.train["step_time"] == pytest.approx({10: 0.2, 20: 0.2, 30: 0.2})
    assert read.valid["loss"] == {30: 8.5}


def test_tensorboard_file_that_a_kill_cut_short_is_read_to_its_last_whole_record(events):
    (file,) = (events / "train_inner").iterdir()
    data = file.read_bytes()
    whole = list(runs.read_events(file))
    for cut in (5, 20, 40):
        file.write_bytes(data[:-cut])
        read = list(runs.read_events(file))
        assert read == whole[: len(read)]
        assert len(whole) - 2 <= len(read) < len(whole)


def test_tensorboard_resumed_run_replaces_what_it_repeats(events):
    with SummaryWriter(str(events / "train_inner"), filename_suffix=".resumed") as writer:
        writer.add_scalar("loss", 7.75, 30)
    assert runs.read_tensorboard(events, "x").train["loss"] == {10: 11.0, 20: 9.0, 30: 7.75}


def test_picture_is_drawn_with_a_panel_for_each_kind_of_column(log, tmp_path, capsys):
    out = tmp_path / "new" / "curves.png"
    assert run(log, "--out", out, "--title", "Presidential addresses") == 0
    panels = "perplexity, loss (bits per token), evaluations of f, residual, converged share, "
    panels += "seconds per update, spectral radius, Jacobian penalty, learning rate, norm of the gradient"
    assert capsys.readouterr().out == f"{out}: {panels}\n"
    assert out.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    height, width, _ = image.imread(out).shape
    assert width > 1000
    assert height > 1000
    assert coloured_share(out) > 0.001
    assert [path.name for path in out.parent.iterdir()] == ["curves.png"]


def test_columns_that_are_absent_leave_their_panels_out(tmp_path, capsys):
    path = tmp_path / "plain.log"
    path.write_text('{"epoch": 1, "loss": "9", "ppl": "512", "num_updates": "1"}\n')
    assert run(path, "--out", tmp_path / "x.png") == 0
    assert capsys.readouterr().out.strip().endswith(": perplexity, loss (bits per token)")


def test_runs_are_overlaid(log, events, tmp_path, monkeypatch):
    """The lines that matplotlib gets are those of both runs, each under its name."""
    from matplotlib.axes import Axes

    drawn = []
    plot = Axes.plot

    def record(axis, x, y, **style):
        drawn.append((style["label"], list(x), list(y)))
        return plot(axis, x, y, **style)

    monkeypatch.setattr(Axes, "plot", record)
    assert run(log, f"second={events}", "--out", tmp_path / "both.png") == 0
    assert ("first, training", [10, 20], [11.5, 9.9]) in drawn
    assert ("first, validation", [20], [9.5]) in drawn
    assert ("second, training", [10, 20, 30], [11.0, 9.0, 8.0]) in drawn
    assert ("second, validation", [30], [8.5]) in drawn
    assert ("first, training, backward solve", [20], [9.25]) in drawn
    assert ("second, training, forward solve", [10, 20, 30], [0.125, 0.125, 0.125]) in drawn
    assert coloured_share(tmp_path / "both.png") > 0.001


def stats(update, **more):
    """A line of progress."""
    values = {"loss": 9 - update / 100, "ppl": 99, "lr": 0.001, **more}
    return json.dumps({"epoch": 1, **{k: str(v) for k, v in values.items()}, "num_updates": str(update)})


CONFIGURATION = (
    "{'_name': None, 'common': {'seed': 1}, 'model': {'_name': 'deq', 'f_thres': 30, 'b_thres': 25, "
    "'f_eps': 0.001, 'b_eps': 1e-02, 'pretrain_steps': %d}}"
)


@pytest.fixture
def pretrained(tmp_path):
    """A run of 40 updates as a stack and 20 at the equilibrium, whose learning rate ends at 0."""
    solves = {"f_nfe": 20, "b_nfe": 15, "f_res": 1e-4, "b_res": 2e-4}
    lines = [stats(20), stats(40, lr=0.002), stats(50, lr=0.001, **solves), stats(60, lr=0, **solves)]
    path = tmp_path / "pretrained.log"
    path.write_text("\n".join([CONFIGURATION % 40, *lines]) + "\n")
    return path


def test_the_options_that_are_drawn_come_from_the_configuration_in_the_log(pretrained):
    read = runs.read_json_log(pretrained, "x")
    expected = {"f_thres": 30, "b_thres": 25, "f_eps": 1e-3, "b_eps": 1e-2, "pretrain_steps": 40}
    assert read.settings.values == expected
    assert read.switch == 40


@pytest.mark.parametrize(("steps", "switch"), [(43, 43), (0, 40), (99, 40)])
def test_the_switch_is_where_the_option_says_if_the_columns_agree(pretrained, steps, switch):
    pretrained.write_text(
        pretrained.read_text().replace("'pretrain_steps': 40", f"'pretrain_steps': {steps}")
    )
    assert runs.read_json_log(pretrained, "x").switch == switch


def test_without_a_stack_before_there_is_no_switch(log):
    assert runs.read_json_log(log, "x").switch is None


def test_the_options_come_from_the_command_and_the_architecture_in_tensorboard(events):
    with SummaryWriter(str(events / "train_inner"), filename_suffix=".command") as writer:
        command = "fairseq-train data --arch deq_transformer_lm_tiny --f-thres 8 --b-eps 5e-3 --f-thres 9"
        writer.add_text("sys.argv", command)
    values = runs.read_tensorboard(events, "x").settings.values
    from fairseq.models import MODEL_DATACLASS_REGISTRY

    defaults = MODEL_DATACLASS_REGISTRY["deq_transformer_lm_tiny"]()
    assert values["f_thres"] == 9
    assert values["b_eps"] == 5e-3
    assert values["b_thres"] == defaults.b_thres
    assert values["f_eps"] == defaults.f_eps


def test_the_learning_rate_is_drawn_where_it_is_used(pretrained):
    # What stands beside an update is the rate of the next one; that beside the last is never used.
    assert runs.read_json_log(pretrained, "x").train["lr"] == {21: 0.001, 41: 0.002, 51: 0.001}


def figure_of(monkeypatch, *arguments):
    """What is drawn, as matplotlib has it."""
    from matplotlib.figure import Figure

    kept = []
    savefig = Figure.savefig

    def keep(figure, *given, **named):
        kept.append(figure)
        savefig(figure, *given, **named)

    monkeypatch.setattr(Figure, "savefig", keep)
    assert run(*arguments) == 0
    return kept[0]


def test_caps_tolerances_and_the_switch_are_marked(pretrained, tmp_path, monkeypatch):
    figure = figure_of(monkeypatch, pretrained, "--out", tmp_path / "x.png")
    panels = {axis.get_title(): axis for axis in figure.axes if axis.get_visible()}

    def lines(panel, label):
        return [line for line in panels[panel].get_lines() if line.get_label() == label]

    assert [line.get_ydata()[0] for line in lines("evaluations of f", "_limit")] == [25, 30]
    assert [line.get_ydata()[0] for line in lines("residual", "_limit")] == [1e-3, 1e-2]
    assert lines("perplexity", "_limit") == []
    assert all([line.get_xdata()[0] for line in lines(panel, "_switch")] == [40] for panel in panels)


def test_panels_share_their_axis_and_the_legend_is_outside(pretrained, tmp_path, monkeypatch):
    figure = figure_of(monkeypatch, pretrained, "--out", tmp_path / "x.png")
    axes = [axis for axis in figure.axes if axis.get_visible()]
    assert len({axis.get_xlim() for axis in axes}) == 1
    (legend,) = figure.legends
    assert [axis.get_legend() for axis in axes] == [None] * len(axes)
    place = legend.get_window_extent()
    assert not any(place.overlaps(axis.get_window_extent()) for axis in axes)
    words = {text.get_text() for text in legend.get_texts()}
    assert {"switch to the equilibrium", "backward solve", "cap of the evaluations, tolerance"} <= words
    assert "validation" not in words


def test_there_is_a_default_file_and_numbers_for_machines(pretrained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(f"mine={pretrained}", "--json", "curves.json") == 0
    assert capsys.readouterr().out.startswith("training.png: perplexity, ")
    assert coloured_share(tmp_path / "training.png") > 0.001
    (curves,) = json.loads((tmp_path / "curves.json").read_text())
    assert (curves["name"], curves["switch"]) == ("mine", 40)
    assert curves["train"]["f_nfe"] == [[50, 20.0], [60, 20.0]]


BAD_INPUT = [
    (["{tmp}/nothing.log"], "The run {tmp}/nothing.log does not exist"),
    (["x={tmp}/nothing.log"], "The run {tmp}/nothing.log does not exist"),
    (["{tmp}/empty.log"], "--log-format json --log-file FILE"),
    (["{tmp}/prose.log"], "--log-format json --log-file FILE"),
    (["{tmp}/other.log"], "none of the columns loss, ppl, f_nfe"),
    (["{tmp}/folder"], "--tensorboard-logdir DIR"),
]


@pytest.mark.parametrize(("arguments", "sentence"), BAD_INPUT)
def test_bad_input_is_one_sentence_and_leaves_no_picture(tmp_path, capsys, arguments, sentence):
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.log").write_text("")
    (tmp_path / "prose.log").write_text("2026-03-01 | INFO | fairseq_cli.train | begin training\n")
    (tmp_path / "other.log").write_text('{"epoch": 1, "lr": "0.1", "num_updates": "1"}\n')
    out = tmp_path / "out.png"
    assert run(*(argument.format(tmp=tmp_path) for argument in arguments), "--out", out) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("fairseq-deq-plot: ")
    assert captured.err.count("\n") == 1
    assert sentence.format(tmp=tmp_path) in captured.err
    assert not out.exists()


@pytest.mark.parametrize(("name", "sentence"), [("x.pdf", "must end in .png"), ("folder.png", "is a folder")])
def test_output_must_be_a_png_file(log, tmp_path, capsys, name, sentence):
    (tmp_path / "folder.png").mkdir()
    assert run(log, "--out", tmp_path / name) == 1
    assert sentence in capsys.readouterr().err
