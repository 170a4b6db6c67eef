"""Is this the base that an adapter was trained on? By name, by the content of its files, and by the
shapes of its layers.

PEFT itself only warns about layers it has no weights for, and says nothing about weights it has no
layer for: an adapter on the wrong base would load in part, and answer.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes_lib.config.model_files import broken_shard, local_folder
from recipes_lib.core.atomic_files import file_hashes
from recipes_lib.core.errors import EnvironmentFault, RecipeError, RecipesError
from recipes_lib.core.json_files import DamagedFile, read_object

if TYPE_CHECKING:
    from recipes_lib.config.recipe import Recipe

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
# What decides how a model computes and reads text.
RECORDED = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    ADAPTER_CONFIG,
    "chat_template.jinja",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
)
SAMPLES, SAMPLE_BYTES = 64, 4096
_LORA = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<matrix>[AB])\.weight$")


def base_fingerprint(recipe: Recipe) -> str | None:
    """Return what identifies the base's weights on this machine, or None where its files are not
    there.
    """
    folder = local_folder(recipe)
    return None if folder is None or not any(folder.glob("*.safetensors")) else fingerprint(folder)


def fingerprint(folder: Path) -> str:
    """Return a sha256 over every weight file's name, size, header, and 64 samples spread over its
    tensors.

    It reads 0.3 MiB of a file of any size, and training changes every weight, so another model or
    another revision is told apart.
    """
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        with file.open("rb") as stream:
            header = int.from_bytes(stream.read(8), "little")
            digest.update(f"{file.name}\t{size}\n".encode())
            digest.update(stream.read(min(header, size)))
            room = max(0, size - 8 - header - SAMPLE_BYTES)
            for sample in range(SAMPLES):
                stream.seek(8 + header + room * sample // (SAMPLES - 1))
                digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()


def weight_hashes(folder: Path) -> dict[str, str]:
    """Return the sha256 of every weight file."""
    return file_hashes(folder, sorted(file.name for file in folder.glob("*.safetensors")))


def recorded_hashes(folder: Path) -> dict[str, str]:
    """Return the sha256 of the weights and of every other file that decides what the model answers.

    That of an adapter's settings is without the base's name and revision: a base may be moved, and
    has a check of its own.
    """
    return _hashes(
        folder, sorted({file.name for pattern in RECORDED for file in folder.glob(pattern)})
    )


def changed_files(folder: Path, recorded: Mapping[str, str]) -> list[str]:
    """Return which of the files recorded by `recorded_hashes` are not what they were, those that
    are gone first.
    """
    gone = [name for name in recorded if not (folder / name).is_file()]
    found = _hashes(folder, [name for name in recorded if name not in gone])
    return gone + [name for name, sha256 in found.items() if recorded[name] != sha256]


def _hashes(folder: Path, names: Iterable[str]) -> dict[str, str]:
    hashes = file_hashes(folder, names)
    if ADAPTER_CONFIG in hashes:
        settings = {
            key: value
            for key, value in adapter_config(folder).items()
            if key not in ("base_model_name_or_path", "revision")
        }
        hashes[ADAPTER_CONFIG] = hashlib.sha256(
            json.dumps(settings, sort_keys=True).encode()
        ).hexdigest()
    return hashes


def adapter_config(adapter: Path) -> dict[str, Any]:
    """Return the settings of an adapter.

    Raises:
        DamagedFile: they are not a JSON object that names a base.
    """
    settings = read_object(adapter / ADAPTER_CONFIG)
    if not isinstance(settings.get("base_model_name_or_path"), str):
        raise DamagedFile("does not name its base model", file=adapter / ADAPTER_CONFIG)
    return settings


def check_adapter_files(adapter: Path) -> None:
    """Refuse an adapter that is incomplete, damaged, or a pickle.

    Raises:
        EnvironmentFault: a file is missing or truncated.
        RecipeError: the weights are a pickle, which can run code when it is loaded.
    """
    weights = adapter / ADAPTER_WEIGHTS
    if not weights.is_file():
        if (adapter / "adapter_model.bin").is_file():
            what = (
                f"{adapter / 'adapter_model.bin'} is a pickle, which can run code when it is loaded"
            )
            raise RecipeError(what, "only safetensors are read")
        raise EnvironmentFault(
            f"{adapter} has no {ADAPTER_WEIGHTS}",
            "restore it, or train the run again under another run.name",
        )
    if not (adapter / ADAPTER_CONFIG).is_file():
        raise EnvironmentFault(
            f"{adapter} has no adapter_config.json",
            "restore it, or train the run again under another run.name",
        )
    check_whole(adapter)


def check_whole(folder: Path) -> None:
    """Refuse a folder with a truncated weight file, or one whose index names a file that is
    missing.

    Raises:
        EnvironmentFault: the file, with the size it has and the size it must have.
    """
    index = folder / "model.safetensors.index.json"
    named = read_object(index).get("weight_map", {}) if index.is_file() else {}
    if not isinstance(named, dict) or (index.is_file() and not named):
        raise DamagedFile("names no weights", file=index)
    for file in sorted(
        {*folder.glob("*.safetensors"), *(folder / str(name) for name in named.values())}
    ):
        problem = broken_shard(file) if file.is_file() else f"is missing; {index.name} names it"
        if problem:
            raise EnvironmentFault(
                f"{file} {problem}", "restore it from a backup, or make it again"
            )


def check_base(adapter: Path, *names: str) -> None:
    """Refuse an adapter that was trained on a base of another name.

    Args:
        adapter: its folder.
        *names: what the base is called: as the recipe names it, and where it lies on this machine.

    Raises:
        RecipeError: the adapter names another base.
    """
    recorded = adapter_config(adapter)["base_model_name_or_path"]
    if recorded not in names and Path(recorded).name not in {Path(name).name for name in names}:
        raise RecipeError(
            f"{adapter} was trained on '{recorded}', not on '{names[0]}'", "load it on its own base"
        )


def check_content(run_name: str, recorded: str | None, recipe: Recipe) -> None:
    """Refuse a base whose files are not those the run was trained on: the same name, but another
    revision or other weights.

    Args:
        run_name: for the message.
        recorded: the base's fingerprint when the run ended; None for a run that recorded none.
        recipe: the run's recipe.

    Raises:
        RecipeError: the base has other weights now.
    """
    now = base_fingerprint(recipe)
    if recorded is not None and now is not None and recorded != now:
        revision = f" at revision '{recipe.model.revision}'" if recipe.model.revision else ""
        raise RecipeError(
            f"the base '{recipe.model.name_or_path}'{revision} is not the one that run '{run_name}'"
            " was trained on: its weights differ",
            f"recorded {recorded[:12]}, found {now[:12]}",
            "restore the base, or set model.revision to the commit it was; an adapter means nothing"
            " on another base",
        )


def check_shapes(adapter: Path, model: Any) -> None:
    """Refuse an adapter whose matrices do not fit the base's layers, one for one.

    Args:
        adapter: its folder.
        model: the base, without any adapter.

    Raises:
        RecipeError: a layer is missing on either side, or has another size.
    """
    from safetensors import safe_open

    modules, covered = dict(model.named_modules()), set()
    hint = "it was trained on another base model; load it on its own"
    with safe_open(adapter / ADAPTER_WEIGHTS, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 (not a mapping)
            match = _LORA.match(name)
            if match is None:
                continue
            layer = match["module"].replace(
                ".base_layer", ""
            )  # PEFT nests the adapters of several parameters of one module
            module = modules.get(layer)
            if module is None:
                raise RecipeError(
                    f"{adapter} has weights for {layer}, a layer the base does not have", hint
                )
            covered.add(layer)
            side = "in_features" if match["matrix"] == "A" else "out_features"
            found, expected = (
                tensors.get_slice(name).get_shape()[1 if match["matrix"] == "A" else 0],
                getattr(module, side, None),
            )
            if expected is not None and found != expected:
                raise RecipeError(
                    f"{adapter} does not fit the base: {layer} has {side} {expected}, the adapter"
                    f" {found}",
                    hint,
                )
    config = adapter_config(adapter)
    targets = config.get("target_modules")
    if isinstance(targets, list) and not any(
        config.get(key) for key in ("layers_to_transform", "exclude_modules", "layer_replication")
    ):
        wanted = {
            name
            for name in modules
            if any(name == target or name.endswith(f".{target}") for target in targets)
        }
        missing = sorted(wanted - covered)
        if missing:
            raise RecipeError(
                f"{adapter} has no weights for {len(missing)} layers of the base, {missing[0]}"
                " first",
                hint,
            )


def explain_peft_failure(adapter: Path, error: Exception) -> RecipesError:
    """Return PEFT's refusal to load an adapter as one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [
        type(error).__name__
    ]
    hint = "it was trained on another base model, or its files are damaged"
    return RecipeError(f"{adapter} does not load on its base: {lines[-1]}", hint)
