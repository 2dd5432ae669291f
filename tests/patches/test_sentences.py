"""What a user can mend is said in one sentence, and the status is 1."""

import pytest
from fairseq.dataclass.configs import FairseqConfig
from fairseq.distributed import utils as distributed_utils
from omegaconf import OmegaConf
from torch.multiprocessing.spawn import ProcessRaisedException

from fairseq_deq.errors import OptionError


def run(error):
    """Let a tool of fairseq raise `error`."""

    def main(cfg):
        raise error

    distributed_utils.call_main(OmegaConf.structured(FairseqConfig()), main)


def test_an_option_error_is_the_message_of_the_exit():
    # Python prints a message that is a text, and exits with status 1
    with pytest.raises(SystemExit) as ending:
        run(OptionError("--f-eps must be above 0"))
    assert ending.value.code == "error: --f-eps must be above 0"


def test_an_option_error_of_a_started_process_is_one_sentence_too():
    trace = (
        "\n\n-- Process 1 terminated with the following error:\nTraceback (most recent call last):\n  ...\n"
    )
    trace += "fairseq_deq.errors.OptionError: --f-eps must be above 0\n"
    with pytest.raises(SystemExit) as ending:
        run(ProcessRaisedException(trace, 1, 4711))
    assert ending.value.code == "error: --f-eps must be above 0"


@pytest.mark.parametrize(
    "error", [ValueError("a fault"), ProcessRaisedException("ValueError: a fault", 0, 1)]
)
def test_other_errors_keep_their_traceback(error):
    with pytest.raises(type(error), match="a fault"):
        run(error)


def test_an_option_error_is_a_value_error():
    assert issubclass(OptionError, ValueError)


def test_a_tool_ends_with_the_sentence_alone_and_status_1(command, data_bin, tmp_path):
    output = command(
        *("fairseq-eval-lm", data_bin, "--path", tmp_path / "none.pt"),
        *("--tokens-per-sample", "32", "--cpu"),
    )
    assert output.status == 1
    assert output.text.strip().splitlines()[-1] == f"error: --path: there is no checkpoint {tmp_path}/none.pt"
    assert "Traceback" not in output.text
