"""What is missing, too old or clobbered is named, with its version and what to type."""

import importlib
import importlib.metadata
import runpy
import sys
import types
from pathlib import Path

import pytest
import setuptools
from forked import run_forked

from fairseq_deq import _requirements

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def versions(monkeypatch):
    """Sets what pip lists: distribution and version, or None where there is none of that name."""
    real = importlib.metadata.version
    found = {}  # type: ignore[var-annotated]

    def version(name):
        if name not in found:
            return real(name)
        if found[name] is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(_requirements.metadata, "version", version)
    return found


@pytest.fixture
def fairseq_at(monkeypatch, tmp_path):
    """Puts a folder in the place of fairseq, with all the files that are needed, and returns it."""
    for name in _requirements.ESSENTIAL_FILES:
        path = tmp_path / "fairseq" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        (path if path.suffix else path.with_suffix(".cpython-311-x86_64-linux-gnu.so")).touch()
    module = types.ModuleType("fairseq")
    module.__file__ = str(tmp_path / "fairseq" / "__init__.py")
    module.__version__ = "0.12.3"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fairseq", module)
    return tmp_path / "fairseq"


def test_what_is_installed_here_will_do():
    _requirements.require_fairseq()


@pytest.mark.parametrize(
    ("package", "found", "needed"), [("torch", "2.9.1+cpu", "2.10"), ("numpy", "1.20.3", "1.21")]
)
def test_a_package_that_is_too_old(versions, package, found, needed):
    versions[package] = found
    with pytest.raises(ImportError) as error:
        _requirements.require_torch()
    sentence = f"needs {package} {needed} or newer, and found {package} {found}; type: "
    assert sentence in str(error.value)
    assert f'pip install --upgrade "{package}>={needed}"' in str(error.value)


def test_a_package_that_is_missing(versions, monkeypatch):
    versions["numpy"] = None
    monkeypatch.setattr(_requirements.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match=r"needs numpy 1\.21 or newer, and found none; type: pip install numpy"
    ):
        _requirements.require_torch()


def test_setup_asks_for_the_torch_that_is_checked(monkeypatch):
    asked = {}
    monkeypatch.setattr(setuptools, "setup", lambda **options: asked.update(options))
    runpy.run_path(str(ROOT / "setup.py"))
    assert f"torch>={_requirements.TORCH_MINIMUM}" in asked["install_requires"]
    assert not _requirements._is_older(_requirements.TORCH_MINIMUM, "2.10")


@pytest.mark.parametrize(("version", "is_older"), [("1.9", True), ("1.13", False), ("2.13.0+cpu", False)])
def test_versions_compare_as_numbers(version, is_older):
    assert _requirements._is_older(version, "1.13") is is_older


def test_fairseq_that_is_missing(monkeypatch):
    monkeypatch.setattr(_requirements, "fairseq_is_installed", lambda: False)
    with pytest.raises(ImportError, match=r'found none; type: pip install "fairseq-deq\[fairseq\]"'):
        _requirements.require_fairseq()


def test_fairseq_that_is_too_old(fairseq_at, versions):
    sys.modules["fairseq"].__version__ = "0.10.2"  # type: ignore[attr-defined]
    versions.update({"fairseq": "0.10.2", "ve-fairseq": None, "fairseq-fixed": None})
    with pytest.raises(
        ImportError, match=r"needs fairseq 0\.12\.2 or newer, and found 0\.10\.2 .*uninstall -y fairseq;"
    ):
        _requirements.require_fairseq()


@pytest.mark.parametrize("name", ["trainer.py", "data/data_utils_fast"])
def test_fairseq_with_files_that_another_distribution_took_away(fairseq_at, versions, name):
    for path in (fairseq_at / name).parent.glob(f"{Path(name).name}*"):
        path.unlink()
    versions.update({"fairseq": "0.12.2", "ve-fairseq": "0.12.3", "fairseq-fixed": None})
    with pytest.raises(ImportError) as error:
        _requirements.require_fairseq()
    assert f"the fairseq at {fairseq_at} is incomplete ({name} missing" in str(error.value)
    assert "pip lists ve-fairseq 0.12.3 and fairseq 0.12.2" in str(error.value)
    assert "pip uninstall -y ve-fairseq fairseq; pip install" in str(error.value)


def test_fairseq_that_its_python_cannot_import(fairseq_at, versions, monkeypatch):
    def fail(name):
        raise ValueError("mutable default <class 'CommonConfig'> for field common is not allowed")

    versions.update({"fairseq": "0.12.2", "ve-fairseq": None, "fairseq-fixed": None})
    monkeypatch.setattr(_requirements.importlib, "import_module", fail)
    with pytest.raises(ImportError, match=r"fairseq 0\.12\.2 cannot be imported on Python 3\.\d+; type: "):
        _requirements.require_fairseq()


def test_the_reason_why_an_import_fails_is_kept(fairseq_at, monkeypatch):
    def fail(name):
        raise ModuleNotFoundError("No module named 'pkg_resources'")

    monkeypatch.setattr(_requirements.importlib, "import_module", fail)
    with pytest.raises(ImportError, match="No module named 'pkg_resources'"):
        _requirements.require_fairseq()


def test_a_folder_named_fairseq_is_no_fairseq(monkeypatch, tmp_path):
    (tmp_path / "fairseq").mkdir()
    monkeypatch.delitem(sys.modules, "fairseq")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    importlib.invalidate_caches()
    assert not _requirements.fairseq_is_installed()


WITHOUT_FAIRSEQ = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("fairseq", "fairseq_cli"):
            return None
        return self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""


SOLVING = """
import torch, fairseq_deq.solvers, fairseq_deq.implicit
solver = fairseq_deq.solvers.SolverConfig(rtol=1e-5)
z = fairseq_deq.implicit.fixed_point(
    lambda z: z / 2 + 1, torch.zeros(1, 1, 2), solver, fairseq_deq.implicit.GradientConfig()
).state
assert torch.allclose(z, torch.full_like(z, 2.0), atol=1e-3), z
"""
NEEDING = ("import fairseq_deq.models", "import fairseq_deq.criterions")
SCORING = "from fairseq_deq.tools.entry import run; run('score', [])"


@pytest.fixture(scope="module")
def without_fairseq():
    """What each program ends in where there is no fairseq."""
    programs = (SOLVING, *NEEDING, SCORING)
    return dict(zip(programs, run_forked(f"import torch\n{WITHOUT_FAIRSEQ}", programs)))


def test_solvers_and_gradients_work_without_fairseq(without_fairseq):
    without_fairseq[SOLVING].checked()


@pytest.mark.parametrize("program", NEEDING)
def test_what_needs_fairseq_says_what_to_type_without_it(without_fairseq, program):
    output = without_fairseq[program]
    assert output.status != 0
    last = output.text.strip().splitlines()[-1]
    assert last.startswith(
        "ImportError: fairseq_deq.models, .tasks and .criterions need fairseq 0.12.2 or newer"
    )
    assert "type: pip install" in last


def test_the_command_that_scores_says_what_to_type_without_it(without_fairseq):
    output = without_fairseq[SCORING]
    assert output.status == 1
    assert output.text.startswith("error: ")
    assert "pip install" in output.text
    assert len(output.text.splitlines()) == 1
