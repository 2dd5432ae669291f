"""The schedule follows the reference's formula, and fairseq's trainer follows the schedule."""

import json
import math

import pytest
import torch
from fairseq.optim import build_optimizer
from fairseq.optim.lr_scheduler import build_lr_scheduler
from omegaconf import OmegaConf

import fairseq_deq  # noqa: F401  (registers the schedule)


def _scheduler(**options):
    adam = {"_name": "adam", "adam_betas": "(0.9, 0.999)", "adam_eps": 1e-8, "weight_decay": 0.0}
    adam |= {"use_old_adam": False, "fp16_adam_stats": False, "tpu": False, "lr": [1.0]}
    optimizer = build_optimizer(OmegaConf.create(adam), [torch.nn.Parameter(torch.zeros(1))])
    cfg = {"_name": "cosine_from_zero", "lr": [2.5e-4], "min_lr": 0.0, "warmup_updates": 0} | options
    return build_lr_scheduler(OmegaConf.create(cfg), optimizer)


def test_the_published_schedule():
    """16,000 updates of warm-up, 300,000 in all: the line ends at lr, the cosine takes over at 0.993 lr."""
    scheduler = _scheduler(warmup_updates=16000, max_update=300000)
    assert scheduler.step_update(8000) == pytest.approx(1.25e-4)
    assert scheduler.step_update(15999) == pytest.approx(2.5e-4, rel=1e-4)
    assert scheduler.step_update(16000) == pytest.approx(2.5e-4 * 0.993, rel=1e-4)
    assert scheduler.step_update(150000) == pytest.approx(1.25e-4)
    assert scheduler.step_update(300000) == pytest.approx(0.0, abs=1e-12)
    assert scheduler.step_update(400000) == pytest.approx(0.0, abs=1e-12)


def test_it_is_torchs_cosine_after_the_warm_up():
    parameter = torch.nn.Parameter(torch.zeros(1))
    sgd = torch.optim.SGD([parameter], lr=2.5e-4)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, T_max=40, eta_min=1e-5)
    scheduler = _scheduler(warmup_updates=5, max_update=40, min_lr=1e-5)
    for update in range(1, 41):
        sgd.step()
        cosine.step()
        if update >= 5:
            assert scheduler.step_update(update) == pytest.approx(cosine.get_last_lr()[0])


def test_without_warm_up_it_starts_at_the_peak():
    assert _scheduler(max_update=10).optimizer.get_lr() == pytest.approx(2.5e-4)


def test_the_trainer_follows_it_through_a_resume(in_process, deq_training, tmp_path):
    options = "--lr-scheduler cosine_from_zero --warmup-updates 2 --log-interval 1 --log-format json".split()
    training = (*deq_training, *options, "--save-dir", tmp_path, "--disable-validation", "--max-epoch", "1")

    def rates(*more):
        log = in_process("fairseq-train", *training, *more).checked().text
        lines = [json.loads(line[line.index("{") :]) for line in log.splitlines() if '{"epoch"' in line]
        return {int(line["num_updates"]): float(line["lr"]) for line in lines if "lr" in line}

    # What the log shows beside update n was set after it, for the next one.
    seen = rates("--max-update", "5", "--stop-min-lr", "-1")
    expected = [0.01 * (n / 2 if n < 2 else (1 + math.cos(math.pi * n / 5)) / 2) for n in range(6)]
    assert seen == pytest.approx({n: expected[n] for n in range(1, 6)}, abs=1e-8, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--warmup-updates 9", "--warmup-updates in [0, --max-update]; got 3 and 9"),
        ("--min-lr 0.5", "--min-lr must lie in [0, --lr], got 0.5"),
        ("--lr 0.1,0.2", "--lr-scheduler cosine_from_zero takes one --lr, got 2"),
        ("--max-update 0 --max-epoch 1", "needs --max-update above 0"),
    ],
)
def test_bad_input_is_one_sentence(options, sentence, refused, deq_training):
    training = (*deq_training, "--lr-scheduler", "cosine_from_zero", "--no-save", *options.split())
    assert sentence in refused("fairseq-train", *training).text
