"""fairseq gets to know the package when it is asked for, and not by the solvers alone."""

import subprocess
import sys
from pathlib import Path

import pytest

import fairseq_deq

STATE = """
import logging, sys
from fairseq.distributed import utils
from fairseq.models import MODEL_REGISTRY
from fairseq.tasks import TASK_REGISTRY
names = "deq_transformer_lm" in MODEL_REGISTRY, "copy_memory" in TASK_REGISTRY
print(*names, hasattr(utils.call_main, "__wrapped__"), logging.getLogger().level == logging.DEBUG)
"""


def run(program):
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    "program",
    [
        "import fairseq_deq",
        "import fairseq\nimport fairseq_deq",
        "from fairseq_deq.models.deq_transformer_lm import DEQTransformerLanguageModel",
        "from fairseq_deq.generation.text import bound_lengths",
    ],
)
def test_the_package_registers_and_leaves_the_root_logger_as_python_has_it(program):
    assert run(program + STATE) == ["True", "True", "True", "False"]


SOLVERS = "import sys, fairseq_deq.solvers, fairseq_deq.implicit, fairseq_deq.jacobian\n"


def test_the_solvers_import_nothing_of_fairseq_until_the_program_does():
    count = "print(sum(name.split('.')[0] in ('fairseq', 'fairseq_cli', 'hydra') for name in sys.modules))"
    assert run(SOLVERS + count + STATE)[:4] == ["0", "True", "True", "True"]


def test_the_solvers_leave_a_fairseq_that_is_there_as_it_is():
    assert run("import fairseq\n" + SOLVERS + STATE)[:3] == ["False", "False", "False"]


@pytest.mark.slow
@pytest.mark.parametrize("room", ["generation", "tasks", "criterions", "optim", "patches"])
def test_any_module_may_be_the_first_that_a_program_imports(room):
    """Or a circle of imports shows, which another first one hides."""
    files = sorted((Path(fairseq_deq.__file__).parent / room).glob("*.py"))
    modules = [f"fairseq_deq.{room}.{path.stem}" for path in files if path.stem != "__init__"]
    assert modules
    programs = [f"import {name}" for name in modules if not name.endswith("__main__")]
    failed = [
        p for p in programs if subprocess.run([sys.executable, "-c", p], capture_output=True).returncode
    ]
    assert not failed
