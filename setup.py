"""Installation of fairseq_deq; tool configuration is in pyproject.toml."""

import re
from keyword import iskeyword
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.sdist import sdist

HERE = Path(__file__).parent


def said_in(file: str, name: str) -> str:
    """The string that a file of the package gives a name."""
    text = (HERE / "fairseq_deq" / file).read_text(encoding="utf-8")
    return re.search(rf'^{name} = "(.+)"$', text, re.M).group(1)


VERSION, TORCH = said_in("__init__.py", "__version__"), said_in("_requirements.py", "TORCH_MINIMUM")
README = HERE / "README.md"


class SourceDistribution(sdist):
    """The package with what its tests need: they read the documents and run the scripts."""

    def make_distribution(self) -> None:
        """Write the archive."""
        for folder in ("tests", "examples", "scripts"):
            self.filelist.graft(folder)
        self.filelist.global_exclude("*.py[cod]")
        super().make_distribution()


# Several distributions provide the module `fairseq` and overwrite each other's files, and no marker can say
# "unless another one is there"; so fairseq is an extra, and one provider is named for each Python.
LINUX = 'platform_system == "Linux" and platform_machine == "x86_64"'
FAIRSEQ = [
    f've-fairseq==0.12.3; python_version >= "3.11" and python_version < "3.13" and {LINUX}',
    'hydra-core>=1.3.2,<1.4; python_version >= "3.11"',
    'omegaconf>=2.3,<2.4; python_version >= "3.11"',
    'fairseq==0.12.2; python_version < "3.11"',
    'numpy<1.24; python_version < "3.11"',
    'setuptools<81; python_version < "3.11"',
    'fairseq-fixed==0.12.3.1; python_version >= "3.13"',
]


def function_of(tool: str) -> str:
    """The name of a tool's function in fairseq_deq/tools/entry.py."""
    return tool.replace("-", "_") + "_" * iskeyword(tool)


# fairseq_deq/tools/entry.py has a function for each.
TOOLS = ["anytime", "average", "benchmark", "benchmark-generation", "convert", "diagnose", "export", "import"]
TOOLS += ["plot", "prepare", "score", "unigram"]

setup(
    name="fairseq-deq",
    version=VERSION,
    description="Deep equilibrium language models for fairseq",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    packages=find_packages(include=["fairseq_deq", "fairseq_deq.*"]),
    package_data={"fairseq_deq": ["py.typed"], "fairseq_deq.tools.diagnose": ["page.css", "page.js"]},
    cmdclass={"sdist": SourceDistribution},
    project_urls={"Paper": "https://arxiv.org/abs/1909.01377"},
    entry_points={
        "console_scripts": [
            f"fairseq-deq-{name} = fairseq_deq.tools.entry:{function_of(name)}" for name in TOOLS
        ]
    },
    python_requires=">=3.10",
    install_requires=[f"torch>={TORCH}", "numpy", "tqdm"],
    extras_require={
        "fairseq": FAIRSEQ,
        "export": ["safetensors"],
        "text": ["sacremoses", "sentencepiece", "subword-nmt"],
        "test": ["mypy", "pytest", "pytest-xdist", "ruff", "safetensors"],
        "plot": ["matplotlib", "tensorboardX"],
    },
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Operating System :: POSIX :: Linux",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
