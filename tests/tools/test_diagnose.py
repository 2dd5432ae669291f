"""fairseq-deq-diagnose: what it measures, what it says of that, its page and its exit status."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from browser import CHROMIUM, Browser

from fairseq_deq.layers.layer import Layer
from fairseq_deq.models.deq_config import DEQLanguageModelConfig
from fairseq_deq.models.deq_decoder import DEQDecoder
from fairseq_deq.models.segment_decoder import InputOptions
from fairseq_deq.solvers import Status
from fairseq_deq.tasks._streams import StreamBatches, StreamText
from fairseq_deq.tools.diagnose.checks import check_invariances
from fairseq_deq.tools.diagnose.command import main
from fairseq_deq.tools.diagnose.measure import STAGES, measure
from fairseq_deq.tools.diagnose.solves import shares
from fairseq_deq.tools.diagnose.spectra import measure_spectra
from fairseq_deq.tools.diagnose.subject import Subject
from fairseq_deq.tools.diagnose.verdict import exit_status, percent
from fairseq_deq.tools.diagnose.verdicts import judge

VOCABULARY = 40


class Tanh(Layer):
    """A layer of one's own: z_t = tanh(W (z_t + z_{t-1}) + u_t), evaluated at all positions at once."""

    def __init__(self, size: float) -> None:
        super().__init__(state_dim=12, injection_dim=12)
        torch.manual_seed(0)
        self.weight = torch.nn.Parameter(size * torch.randn(12, 12) / 12**0.5)

    def initialize(self, initializer):
        pass

    def memory_length(self, mem_len):
        return 0

    def prepare(self, masks):
        return self

    def bind(self, injection, context, padding=None, start=0):
        def f(z):
            before = torch.nn.functional.pad(z, (0, 0, 1, 0))[:, :-1]
            return torch.tanh((z + before) @ self.weight.T + injection)

        return f


def subject_of(layer: Layer, tokens: int = 256, **options) -> Subject:
    """A model of this layer, untrained, at random text."""
    from fairseq.data import Dictionary

    words = Dictionary()
    for i in range(VOCABULARY):
        words.add_symbol(f"word{i}")
    options = {"share_decoder_input_output_embed": "true", "decoder_embed_dim": 12} | options
    missing = {"max_update": 0, "tokens_per_sample": 16, "max_target_positions": None, "add_bos_token": False}
    cfg = DEQLanguageModelConfig(**(missing | options))
    decoder = DEQDecoder(cfg, words, layer, InputOptions(scale=1.0, dropout=0.0)).eval()

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder = decoder

        def forward(self, src_tokens, src_lengths=None, memory=None):
            return self.decoder(src_tokens, memory=memory)

        def get_normalized_probs(self, output, log_probs, sample):
            return self.decoder.get_normalized_probs(output, log_probs, sample)

    text = torch.randint(4, len(words), (tokens,), generator=torch.Generator().manual_seed(1))
    stream = StreamText("text", [text], np.array([tokens]), words.eos(), words.pad())
    batches = StreamBatches(stream, 4, 0, 4, 16, whole_blocks=True)
    return Subject("own.pt", Model().eval(), words, {}, 7, batches, "text", tokens)


@pytest.fixture(scope="module")
def healthy():
    """What was measured of a layer of one's own that contracts, and the subject."""
    subject = subject_of(Tanh(0.25))
    seen = []
    return measure(subject, seen.append), subject, seen


def titles(m) -> dict[str, str]:
    return {verdict.title: verdict.level for verdict in judge(m)}


def test_a_contracting_layer_of_ones_own_is_healthy(healthy):
    m, _, seen = healthy
    assert seen == list(STAGES)
    verdicts = judge(m)
    assert exit_status(verdicts) == 0, verdicts
    assert titles(m)["Solves converge"] == "good"
    assert titles(m)["One equilibrium, whatever the start"] == "good"
    assert titles(m)["Causal, and independent of batch mates"] == "good"
    assert sum(m.share(status) for status in Status) == pytest.approx(1)
    assert m.own.perplexity == pytest.approx(m.passed.perplexity)  # the trial has all of so short a text
    assert m.bits_per_byte == pytest.approx(float(m.passed.loss.sum()) / math.log(2) / m.bytes, rel=1e-5)


def test_the_spectrum_is_that_of_the_blocks(healthy):
    _, subject, _ = healthy
    layer = subject.layer()
    spectra = measure_spectra(layer)
    weight = subject.decoder.layer.weight
    z = layer.state.detach()
    slope = 1 - layer.f(z).detach() ** 2  # of tanh
    blocks = slope.unsqueeze(-1) * weight.detach()
    expected = torch.linalg.eigvals(blocks).abs().amax(-1).amax(0)[spectra.places]
    assert torch.allclose(torch.tensor(spectra.radii), expected, atol=1e-3)
    mean = blocks.flatten(0, 1).mean(0)
    known = torch.linalg.svdvals(mean)
    assert torch.allclose(torch.tensor(spectra.singular_values).float(), known, atol=0.05)
    assert set(spectra.block_eigenvalues) == {"easiest", "middling", "hardest"}


def test_gradients_are_told_apart(healthy):
    m, _, _ = healthy
    assert m.gradients.of("ift").cosine > 0.9999
    assert m.gradients.of("unroll").cosine > 0.999
    assert m.gradients.of("jfb").error > 5 * m.gradients.of("ift").error
    errors = [error for _, error in m.gradients.by_tolerance]
    assert errors[-1] < errors[0] / 20


def test_curves_end_below_the_tolerance(healthy):
    m, _, _ = healthy
    for curve in (m.forward[0], m.backward[0]):
        assert curve.residual[-1] <= m.tolerance
        assert curve.work == sorted(curve.work)
        assert curve.converged[-1] == 1


def test_a_layer_that_expands_is_named(healthy):
    subject = subject_of(Tanh(6.0), f_thres=20)
    m = measure(subject)
    found = titles(m)
    assert found["Solves do not converge"] == "bad"
    assert found["The layer expands"] == "look"
    assert exit_status(judge(m)) == 1
    assert m.penalty is not None
    assert subject.decoder.penalty.weight == 0  # only a copy was trained
    assert not subject.model.training


def test_a_budget_that_is_too_small_is_named_with_one_that_is_not(healthy):
    m = measure(subject_of(Tanh(0.25), f_thres=2))
    (verdict,) = [v for v in judge(m) if v.section == "convergence" and v.level == "bad"]
    larger = re.search(r"--f-thres (\d+), (\S+) converge", verdict.sentence)
    assert larger
    assert int(larger.group(1)) in (8, 16, 32)
    assert next(t for t in m.budgets if t.budget == int(larger.group(1))).converged >= 0.99


def test_a_layer_that_is_not_finite_is_named_first():
    subject = subject_of(Tanh(0.25))
    with torch.no_grad():
        subject.decoder.layer.weight.fill_(math.nan)
    m = measure(subject)
    verdicts = judge(m)
    assert verdicts[0].title == "The layer is not finite"
    assert "100% of the positions" in verdicts[0].sentence
    assert m.spectra is None


def test_a_layer_that_looks_ahead_is_found():
    class Ahead(Tanh):
        def bind(self, injection, context, padding=None, start=0):
            mean = injection.mean(1, keepdim=True)
            return super().bind(injection + mean, context, padding, start)

    subject = subject_of(Ahead(0.25))
    found = check_invariances(subject, subject.layer())
    assert not found.causal
    assert found.batch_invariant


@pytest.mark.parametrize(
    ("changes", "title", "level"),
    [
        (
            {"backward_converged": 0.7, "backward_longer": 0.99},
            "The backward solve does not converge",
            "look",
        ),
        ({"starts": {"apart": 0.2}}, "There are several equilibria", "look"),
        ({"starts": {"apart": 0.2}, "scope": "recurrence"}, "There are several equilibria", "hint"),
        ({"starts": {"converged": [0.5, 1.0, 1.0]}}, "Solves from random starts are hard", "hint"),
        ({"invariances": {"causal": False}}, "States depend on later tokens or on other rows", "look"),
        ({"spectra": {"radii": [6.0], "places": [3]}}, "Some positions expand", "hint"),
        ({"spectra": {"radii": [13.0], "places": [3]}}, "The layer expands", "look"),
    ],
)
def test_each_fault_is_named(healthy, changes, title, level):
    m, _, _ = healthy
    changed = {
        name: replace(getattr(m, name), **value) if isinstance(value, dict) else value
        for name, value in changes.items()
    }
    m = replace(m, **changed)
    assert titles(m)[title] == level
    assert exit_status(judge(m)) == (level == "look")


def test_a_score_that_moves_beyond_the_budget_is_named(healthy):
    m, _, _ = healthy
    last = replace(m.budgets[-1], loss=m.own.loss * 0.9)
    assert (
        titles(replace(m, budgets=[*m.budgets[:-1], last]))["The score is not that of the equilibrium"]
        == "look"
    )


def test_percent_never_rounds_to_all_or_nothing():
    assert [percent(x) for x in (0, 1, 0.5, 0.9996, 0.0004, 0.99)] == [
        *("0%", "100%", "50%", "99.96%", "0.04%", "99.0%"),
    ]


def test_shares_of_bins_add_up():
    assert shares(torch.tensor([0.0, 1, 2, 3, 9]), [1, 2, 3, 4]) == pytest.approx([0.4, 0.2, 0.4])


# ---------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def reported(deq_checkpoint, data_bin, tmp_path_factory):
    """The page and the numbers of the tiny model beside itself, and the exit status."""
    folder = tmp_path_factory.mktemp("report")
    page, numbers = folder / "report.html", folder / "numbers.json"
    arguments = [deq_checkpoint, data_bin, "--out", page, "--json", numbers, "--tokens", 512, "--rows", 4]
    status = main([*map(str, arguments), "--compare", str(deq_checkpoint)])
    return SimpleNamespace(page=page, numbers=json.loads(numbers.read_text()), status=status)


def test_page_and_numbers_are_written(reported):
    html = reported.page.read_text(encoding="utf-8")
    assert "http" not in re.sub(r"<script type=application/json.*?</script>", "", html, flags=re.S)
    assert len(html) < 3e6
    assert reported.status == reported.numbers["status"]
    assert reported.numbers["budget"] == 8
    assert reported.numbers["passed"]["perplexity"] == pytest.approx(
        reported.numbers["other"]["passed"]["perplexity"]
    )
    for verdict in reported.numbers["verdicts"]:
        assert verdict["title"] in html
    for title in ("Convergence", "The text", "The Jacobian", "The gradient", "Is it an equilibrium?"):
        assert f"<h2>{title}</h2>" in html


@pytest.mark.slow
def test_a_trellisnet_on_raw_text(in_process, data_bin, text, tmp_path):
    from test_end_to_end_trellis import TINY

    in_process("fairseq-train", data_bin, *TINY, "--save-dir", tmp_path, "--max-update", "4")
    page = tmp_path / "report.html"
    arguments = [tmp_path / "checkpoint_last.pt", data_bin, "--out", page, "--input", text / "test.txt"]
    assert main([*map(str, arguments), "--tokens", "256", "--rows", "4"]) in (0, 1)
    html = page.read_text(encoding="utf-8")
    assert "TrellisLayer" in html
    assert "since a recurrence chooses its own starts" in html


def test_weights_that_are_not_finite_end_with_a_page_that_names_the_row(
    deq_checkpoint, data_bin, tmp_path, capsys
):
    state = torch.load(deq_checkpoint, weights_only=False)
    state["model"]["decoder.embed_tokens.weight"][17] = math.nan
    bad, page = tmp_path / "bad.pt", tmp_path / "report.html"
    torch.save(state, bad)
    assert main([str(bad), str(data_bin), "--out", str(page)]) == 2
    assert "holds NaN or infinity in its weights" in capsys.readouterr().err
    html = page.read_text(encoding="utf-8")
    assert "The weights are not finite" in html
    assert "decoder.embed_tokens.weight, 1 of" in html
    assert "rows (17)" in html


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (["--tokens", "1"], "--tokens must be at least 2, got 1"),
        (["--rows", "0"], "--rows must be at least 1, got 0"),
        (["--out", "nowhere/report.html"], "--out nowhere/report.html: there is no folder"),
        (["--gen-subset", "other"], "has no text 'other'"),
        (["--input", "nowhere.txt"], "--input: there is no text nowhere.txt"),
        (["--model-overrides", "[1]"], "--model-overrides must be a dictionary"),
        (["--compare", "nowhere.pt"], "there is no checkpoint nowhere.pt"),
        (["--model-overrides", "{'pretrain_steps': 9}"], "is a stack of layers, not an equilibrium"),
    ],
)
def test_bad_input_is_one_sentence(deq_checkpoint, data_bin, tmp_path, capsys, change, sentence):
    arguments = [str(deq_checkpoint), str(data_bin), "--out", str(tmp_path / "report.html")]
    assert main([*arguments, *change]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("fairseq-deq-diagnose: ")
    assert sentence in error


def test_another_model_is_refused(tiny_checkpoint, data_bin, tmp_path, capsys):
    assert main([str(tiny_checkpoint), str(data_bin), "--out", str(tmp_path / "report.html")]) == 2
    assert "is a TransformerLanguageModel, which has no solver" in capsys.readouterr().err


# ---------------------------------------------------------------------- in a browser


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the PATH")
@pytest.mark.parametrize(("width", "dark"), [(1100, False), (390, True)], ids=["desktop", "phone"])
def test_the_page_works_in_a_browser(reported, width, dark, tmp_path):
    page = tmp_path / "report.html"
    shutil.copy(reported.page, page)
    with Browser() as browser:
        browser.open(page, width=width, dark=dark)
        assert browser.run("document.documentElement.scrollWidth <= innerWidth")
        assert browser.run("document.getElementById('tip').hidden")
        colours = "[...document.querySelectorAll('.w')].map(w => getComputedStyle(w).backgroundColor).join()"
        by_evaluations = browser.run(colours)
        browser.click("input[value=l]")
        assert browser.run("document.getElementById('text').dataset.by") == "l"
        assert browser.run(colours) != by_evaluations
        word = "[data-i='5']"
        browser.click(word) if width < 600 else browser.point_at(word)
        tip = browser.run("document.getElementById('tip').innerText")
        for part in ("evaluations: ", "residual: ", "log-probability of ", "likeliest: ", "the other: "):
            assert part in tip
        assert browser.run(f'document.querySelector("{word}").textContent.trim()') in tip
        browser.run("document.getElementById('text').focus()")
        browser.press("ArrowRight")
        assert browser.run("document.querySelector('.w.here').dataset.i") == "6"
        assert browser.run("getComputedStyle(document.body).backgroundColor") == (
            "rgb(21, 24, 28)" if dark else "rgb(255, 255, 255)"
        )
        printed = browser.pdf()
        assert printed.startswith(b"%PDF")
        assert len(printed) > 20_000
        assert browser.errors == []
        assert {address.split(":")[0] for address in browser.requests} <= {"file", "data"}
