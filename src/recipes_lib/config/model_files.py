"""The base model's files on this machine, looked at without loading them: is it a model we can
train, and is it whole?
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from recipes_lib.core.errors import RecipeError, one_line
from recipes_lib.core.json_files import object_or_none
from recipes_lib.core.project import cache_root
from recipes_lib.models.architectures import ARCHITECTURES

if TYPE_CHECKING:
    from recipes_lib.config.recipe import Recipe

KEY = "model.name_or_path"
_CAUSAL = ("ForCausalLM", "LMHeadModel")
DEQUANTIZED = "mxfp4"  # gpt-oss has no other weights on the Hub; loaded as `model.dtype`
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_HUB_PART = r"[A-Za-z0-9_](?:[\w.-]{0,94}[A-Za-z0-9_])?"
_HUB_ID = re.compile(rf"(?:{_HUB_PART}/)?{_HUB_PART}\Z", re.ASCII)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def local_folder(recipe: Recipe) -> Path | None:
    """Return the folder with the model's files, or None when it is not on this machine.

    A folder, a packaged model that was materialised, or a Hub repository in the local cache.

    Raises:
        RecipeError: the name is a path, and there is nothing.
    """
    name = recipe.model.name_or_path
    if name.startswith("package:"):
        return _materialised(name)
    if wrong := no_model_at(name):
        raise recipe.error(KEY, *wrong)
    path = Path(name)
    if path.is_dir():
        return path
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(name, "config.json", revision=recipe.model.revision)
    return Path(config).parent if isinstance(config, str) else None


def no_model_at(name: str) -> tuple[str, ...] | None:
    """Return what is wrong with a name that can only be a path of this machine, and a hint; None
    for a folder and for a Hub id.
    """
    try:
        is_folder, is_file = os.path.isdir(name), os.path.isfile(name)  # noqa: PTH112, PTH113 (a name that no path can have is not there)
    except ValueError:
        is_folder = is_file = False
    if name.startswith("package:") or is_folder:
        return None
    if name.endswith(".gguf"):
        what = f"'{name}' is a GGUF file; quantized weights cannot be trained further"
        return what, "give the original model's folder or Hub id"
    if is_file:
        what = "a model is a folder with config.json, safetensors and a tokenizer"
        return (f"'{name}' is a file; {what}",)
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        return f"no such folder: {name}", "a relative folder is meant from the working directory"
    if not _HUB_ID.match(name) or "--" in name or ".." in name or name.endswith(".git"):
        what = f"{name!r} is no folder here, and cannot be a name on the Hub"
        return what, "the Hub's names are like meta-llama/Llama-3.1-8B"
    return None


def lacks_tokenizer(recipe: Recipe, folder: Path) -> bool:
    """Whether the tokenizer is still to be fetched: `recipes plan` caches a Hub model's config
    alone.
    """
    return _from_hub(recipe) and not any((folder / name).is_file() for name in TOKENIZER_FILES)


def no_tokenizer(recipe: Recipe, error: Exception) -> RecipeError:
    """Return the error for a model whose tokenizer cannot be read.

    Args:
        error: what transformers said.
    """
    folder = local_folder(recipe)
    if folder is not None and object_or_none(folder / "config.json") is None:
        return _no_config(recipe, folder)
    hint = (
        "the tokenizer's files stand beside the weights: tokenizer.json or tokenizer.model, and"
        " tokenizer_config.json"
    )
    if folder is not None and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return recipe.error(KEY, f"{folder} has no tokenizer ({', '.join(TOKENIZER_FILES)})", hint)
    return recipe.error(KEY, f"the tokenizer cannot be read: {one_line(error)}", hint)


def _no_config(recipe: Recipe, folder: Path) -> RecipeError:
    hint = "a model is a folder with config.json, safetensors and a tokenizer"
    return recipe.error(KEY, f"{folder} has no readable config.json", hint)


def _from_hub(recipe: Recipe) -> bool:
    """Whether a model that is here lies in the Hub's cache, where what is missing is fetched when
    it is needed.
    """
    name = recipe.model.name_or_path
    return not name.startswith("package:") and not Path(name).is_dir()


def _materialised(name: str) -> Path | None:
    """Return the folder a packaged model was converted into; its source.json names the package."""
    for note in (cache_root() / "models").glob("*/source.json"):
        if (object_or_none(note) or {}).get("package") == name:
            return note.parent
    return None


def check_model_files(
    recipe: Recipe, folder: Path, *, remote_code: bool | None = None
) -> Iterator[RecipeError]:
    """Yield what is wrong with a model's files.

    Args:
        remote_code: whether the command line allowed the model's own code; None where nothing will
            be loaded.
    """
    config = object_or_none(folder / "config.json")
    if config is None:
        if files := sorted(folder.glob("*.gguf")):
            what = f"holds GGUF weights ({files[0].name}); quantized weights cannot be trained"
            yield recipe.error(KEY, f"{what} further", "give the original model")
        else:
            yield _no_config(recipe, folder)
        return
    found = config.get("architectures")
    architectures = [str(name) for name in found] if isinstance(found, list) else []
    kind = ARCHITECTURES.get(str(config.get("model_type")))
    if not any(name.endswith(_CAUSAL) for name in architectures or _CAUSAL) and not (
        kind and kind.images
    ):
        what = (
            f"{', '.join(architectures)} is not a causal language model (...ForCausalLM), which is"
            " all that can be trained here"
        )
        yield recipe.error(KEY, what)
    if "quantization_config" in config:
        method = config["quantization_config"]
        method = method.get("quant_method") if isinstance(method, dict) else method
        if method != DEQUANTIZED or recipe.quantization is not None:
            what = f"the model is already quantized ({method or 'a method of its own'})"
            hint = "give the original model; for QLoRA add a quantization section"
            if method == DEQUANTIZED:
                hint = "remove the quantization section: it is trained in model.dtype"
            yield recipe.error(KEY, what, hint)
    if "auto_map" in config and remote_code is not True:
        yield from _remote_code(recipe, remote_code)
    yield from _check_weights(recipe, folder, to_come=_from_hub(recipe))


def _remote_code(recipe: Recipe, allowed: bool | None) -> Iterator[RecipeError]:
    """Code that ships with a model runs only when recipe and command line both say so."""
    if not recipe.model.trust_remote_code:
        what = "the model needs Python code that ships with it"
        hint = "read that code; then set model.trust_remote_code: true and pass --trust-remote-code"
        yield recipe.error(KEY, what, hint)
    elif allowed is False:
        what = "the recipe asks to run the model's own code"
        hint = "pass --trust-remote-code as well"
        yield recipe.error("model.trust_remote_code", what, hint)


def _check_weights(recipe: Recipe, folder: Path, to_come: bool) -> Iterator[RecipeError]:
    """Yield missing, truncated or pickled weight files.

    Args:
        to_come: whether the folder is the Hub's cache, where config and tokenizer lie before the
            weights are fetched.
    """
    index, again = folder / "model.safetensors.index.json", "download the model again"
    content = object_or_none(index)
    present = {path.name for path in folder.glob("*.safetensors")}
    named = content.get("weight_map") if content else None
    if content is not None and not isinstance(named, dict):
        yield recipe.error(KEY, f"{index} has no weight_map", again)
    shards = sorted(set(map(str, named.values())) if isinstance(named, dict) else present)
    for shard in shards:
        if shard not in present:
            if not to_come:
                what = f"{folder / shard} is missing; model.safetensors.index.json names it"
                yield recipe.error(KEY, what, again)
        elif problem := broken_shard(folder / shard):
            yield recipe.error(KEY, f"{folder / shard} {problem}", again)
    if shards or to_come:
        return
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    if pickles:
        what = f"{pickles[0]} is a pickle, which can run code when it is loaded; only safetensors"
        hint = "convert the weights to safetensors, or choose a revision that has them"
        yield recipe.error(KEY, f"{what} are read", hint)
    elif any(folder.glob("*.gguf")):
        what = "holds GGUF weights only; quantized weights cannot be trained further"
        yield recipe.error(KEY, what, "give the original model")
    else:
        yield recipe.error(KEY, f"{folder} has no weights (*.safetensors)")


def broken_shard(path: Path) -> str | None:
    """Return what is wrong with a safetensors file: its header says how long it must be."""
    from safetensors import SafetensorError, safe_open

    actual = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if actual < 8 or length > actual - 8:
            return f"is truncated: {actual:,} bytes, its header alone needs {length + 8:,}"
        try:
            header = json.loads(stream.read(length))
            ends = [
                entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"
            ]
            expected = 8 + length + max(map(int, ends), default=0)
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError):
            return "has a damaged header"
    if actual < expected < 2**63:
        return f"is truncated: {actual:,} bytes, expected {expected:,}"
    try:
        with safe_open(
            path, framework="np"
        ):  # checks every offset, shape and type, and reads no weight
            return None
    except SafetensorError:
        return "has a damaged header"
