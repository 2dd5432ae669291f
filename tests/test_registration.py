"""fairseq gets to know the package when it is asked for, and not by the solvers alone."""

import subprocess
import sys
from pathlib import Path

import pytest
from forked import IMPORTED_BY_FAIRSEQ, run_forked

import fairseq_deq

STATE = """
import logging, sys
from fairseq.distributed import utils
from fairseq.models import MODEL_REGISTRY
from fairseq.tasks import TASK_REGISTRY
names = "deq_transformer_lm" in MODEL_REGISTRY, "copy_memory" in TASK_REGISTRY
print(*names, hasattr(utils.call_main, "__wrapped__"), logging.getLogger().level == logging.DEBUG)
"""


SOLVERS = "import sys, fairseq_deq.solvers, fairseq_deq.implicit, fairseq_deq.jacobian\n"
COUNT = "print(sum(name.split('.')[0] in ('fairseq', 'fairseq_cli', 'hydra') for name in sys.modules))\n"

REGISTERING = (
    "import fairseq_deq",
    "import fairseq\nimport fairseq_deq",
    "from fairseq_deq.models.deq_transformer_lm import DEQTransformerLanguageModel",
    "from fairseq_deq.generation.text import bound_lengths",
)
SOLVERS_FIRST, FAIRSEQ_FIRST = SOLVERS + COUNT, "import fairseq\n" + SOLVERS


@pytest.fixture(scope="module")
def printed():
    """What each program prints, with the state after it."""
    programs = [*REGISTERING, SOLVERS_FIRST, FAIRSEQ_FIRST]
    outputs = run_forked(IMPORTED_BY_FAIRSEQ, [f"{program}\n{STATE}" for program in programs])
    return {program: output.checked().text.split() for program, output in zip(programs, outputs)}


@pytest.mark.parametrize("program", REGISTERING)
def test_the_package_registers_and_leaves_the_root_logger_as_python_has_it(printed, program):
    assert printed[program] == ["True", "True", "True", "False"]


def test_the_solvers_import_nothing_of_fairseq_until_the_program_does(printed):
    assert printed[SOLVERS_FIRST][:4] == ["0", "True", "True", "True"]


def test_the_solvers_leave_a_fairseq_that_is_there_as_it_is(printed):
    assert printed[FAIRSEQ_FIRST][:3] == ["False", "False", "False"]


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
