"""scripts/plot_training.py: what it reads from logs, the picture, and the sentences about bad input."""

import pytest
from matplotlib import image
from runs import SCRIPTS, load_script
from tensorboardX import SummaryWriter

SCRIPT = SCRIPTS / "plot_training.py"
plot_training = load_script(SCRIPT)

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
    return plot_training.main([str(argument) for argument in arguments])


def coloured_share(path):
    """The share of pixels that are neither white nor grey: 0 in an empty frame."""
    pixels = image.imread(path)[..., :3]
    return float(((pixels.max(-1) - pixels.min(-1)) > 0.2).mean())


def test_json_log_gives_the_curves(log):
    read = plot_training.read_json_log(log, "first")
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
    assert plot_training.read_json_log(path, "x").train["loss"] == {7: 9.0}


def test_tensorboard_events_give_the_curves(events):
    read = plot_training.read_tensorboard(events, "x")
    assert read.train["loss"] == {10: 11.0, 20: 9.0, 30: 8.0}
    assert read.train["step_time"] == pytest.approx({10: 0.2, 20: 0.2, 30: 0.2})
    assert read.valid["loss"] == {30: 8.5}


def test_tensorboard_file_that_a_kill_cut_short_is_read_to_its_last_whole_record(events):
    (file,) = (events / "train_inner").iterdir()
    data = file.read_bytes()
    whole = list(plot_training.read_events(file))
    for cut in (5, 20, 40):
        file.write_bytes(data[:-cut])
        read = list(plot_training.read_events(file))
        assert read == whole[: len(read)]
        assert len(whole) - 2 <= len(read) < len(whole)


def test_tensorboard_resumed_run_replaces_what_it_repeats(events):
    with SummaryWriter(str(events / "train_inner"), filename_suffix=".resumed") as writer:
        writer.add_scalar("loss", 7.75, 30)
    assert plot_training.read_tensorboard(events, "x").train["loss"] == {10: 11.0, 20: 9.0, 30: 7.75}


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
    assert ("first", [10, 20], [11.5, 9.9]) in drawn
    assert ("first, validation", [20], [9.5]) in drawn
    assert ("second", [10, 20, 30], [11.0, 9.0, 8.0]) in drawn
    assert ("second, validation", [30], [8.5]) in drawn
    assert ("first, backward", [20], [9.25]) in drawn
    assert ("second, forward", [10, 20, 30], [0.125, 0.125, 0.125]) in drawn
    assert coloured_share(tmp_path / "both.png") > 0.001


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
    assert captured.err.startswith("plot_training.py: ")
    assert captured.err.count("\n") == 1
    assert sentence.format(tmp=tmp_path) in captured.err
    assert not out.exists()


@pytest.mark.parametrize(("name", "sentence"), [("x.pdf", "must end in .png"), ("folder.png", "is a folder")])
def test_output_must_be_a_png_file(log, tmp_path, capsys, name, sentence):
    (tmp_path / "folder.png").mkdir()
    assert run(log, "--out", tmp_path / name) == 1
    assert sentence in capsys.readouterr().err
