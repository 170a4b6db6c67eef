"""Packaging. The dependency floors are the oldest versions whose behaviour the recipes rely on;
constraints.txt has the tested ones.
"""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
INIT = (HERE / "src/recipes_lib/__init__.py").read_text(encoding="utf-8")
VERSION = next(line.split('"')[1] for line in INIT.splitlines() if line.startswith("__version__"))

# What compare, report, check, show, ls and explain need. It goes beside vLLM, axolotl, unsloth and
# LLaMA-Factory, whatever they pin, so these floors are old.
BASE = [
    "numpy>=1.26",  # the first for Python 3.12
    "scipy>=1.11.4",  # the first for Python 3.12
    "pydantic>=2.12",  # vLLM's floor; 2.10 names the parts of our schemas wrongly
    "pyyaml>=6.0.1",  # 6.0 does not build any more
    "jinja2>=3.1",  # reports
    "tqdm>=4.64",
    "filelock>=3.12",
    "packaging>=23",  # reads which packages an extra needs
]

# Training, merging, exporting and whatever else loads a model.
TRAIN = [
    "torch>=2.9",
    "transformers>=5.23,<6",  # the first with activation_checkpointing, which every recipe sets
    "trl>=1.16,<2",  # with 1.9 and transformers 5.16 a test of the labels of Llama-2 rows fails
    "peft>=0.21",
    "accelerate>=1.15",
    "bitsandbytes>=0.50",
    "datasets>=5",
    "huggingface-hub>=1.31",  # the floor of transformers; datasets 5.0 takes no 2
    "tokenizers>=0.23",
    "safetensors>=0.6",
    "sentencepiece>=0.2",  # Llama-2 tokenizers that ship without tokenizer.json
    "pyarrow>=21",
    "psutil>=5.9",
]

# Judges behind a server, and lm-eval's tasks.
EVAL = [*TRAIN, "lm-eval>=0.4.13,<0.5", "openai>=3.57,<4"]
# What the code of lm-eval's tasks ifeval and minerva_math imports; it takes one antlr4 alone.
CHAT_EVALS = [
    "langdetect>=1.0.9",
    "immutabledict>=4.2",
    "nltk>=3.9.1",
    "math-verify>=0.8",
    "antlr4-python3-runtime==4.11.*",
    "sympy>=1.12",
]
# Reads newer logs of Inspect AI, as Inspect itself does; Python's own zipfile can from 3.14 on.
INSPECT = ["zipfile-zstd>=0.0.4; python_version < '3.14'"]
EXTRAS = {
    "train": TRAIN,
    "eval": EVAL,
    # evals/ifeval.yaml and evals/math.yaml. Apart, because this pins an antlr4 that omegaconf's
    # users cannot have beside theirs.
    "chat-evals": [*EVAL, *CHAT_EVALS],
    # Reads the GGUF file of the packaged model. That package itself is not a dependency: it would
    # compile a C++ runtime we do not use.
    "quickstart": [*EVAL, "gguf>=0.17"],
    # The library that tests hold our win rates against. It imports pkg_resources, which setuptools
    # 82 removed.
    "alpaca-eval": ["alpaca-eval>=0.6.6,<0.7", "setuptools<82"],
    "parquet": ["pyarrow>=21"],  # tables and rows in parquet files, without the rest of `train`
    "inspect": INSPECT,
    "dev": [
        *EVAL,
        *INSPECT,
        *CHAT_EVALS,
        "pytest>=9",
        "pytest-timeout>=2.4",
        "pytest-xdist>=3.8",
        "hypothesis>=6.100",
        "statsmodels>=0.14",  # the reference that the statistics are tested against
        "jsonschema>=4.20",
        "ruff>=0.17",
        "mypy>=2",
        "types-PyYAML",
        "pre-commit>=4",
        "tensorboard>=2.20",
    ],
    "gpu": [*TRAIN, "liger-kernel>=0.8.2"],
    "tracking": [*TRAIN, "tensorboard>=2.20", "trackio>=0.40", "wandb>=0.25"],
}

# An installed package brings recipes/ and what they name; a checkout has them at its root.
SHIPPED = {
    f"recipes_lib.shipped.{folder}": folder
    for folder in ("recipes", "evals", "accelerate_configs", "launch", "schema")
}

setup(
    name="recipes-lib",
    version=VERSION,
    description=(
        "Recipes for fine-tuning language models with LoRA and QLoRA, and conclusions that can be"
        " believed"
    ),
    long_description=(
        (HERE / "README.md").read_text(encoding="utf-8") if (HERE / "README.md").exists() else ""
    ),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    package_dir={"": "src", **SHIPPED},
    packages=[*find_packages("src"), *SHIPPED],
    package_data={
        **{package: ["**/*"] for package in SHIPPED},
        "recipes_lib.analysis": ["templates/*"],
        "recipes_lib.config": ["*.json"],
        "recipes_lib.weights": ["*.jinja"],
    },
    python_requires=">=3.11,<3.15",
    install_requires=BASE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["recipes = recipes_lib.cli:main"]},
)
