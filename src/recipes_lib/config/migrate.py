"""`recipes migrate`: the recipe of a flat TRL config, which is ScriptArguments, ModelConfig and
SFTConfig or DPOConfig in one mapping. Each key moves to its section with its comments, or becomes a
comment at the end.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recipes_lib.config.documents import (
    SECTIONS,
    Document,
    Values,
    read,
    relative_path,
    value_text,
    wrong_kind,
)
from recipes_lib.config.parsing import Section
from recipes_lib.config.recipe import DPO, QuantizationSection
from recipes_lib.config.upstream_sections import (
    ACTS_WITH,
    RENAMES,
    LoraSection,
    TrainSection,
    preference_section,
)
from recipes_lib.core.errors import RecipeErrors
from recipes_lib.core.terminal import is_secret_name

# Key of a flat TRL config -> key of a recipe.
MOVES = {
    "model_name_or_path": "model.name_or_path",
    "model_revision": "model.revision",
    "dtype": "model.dtype",
    "torch_dtype": "model.dtype",
    "attn_implementation": "model.attn_implementation",
    "trust_remote_code": "model.trust_remote_code",
    "dataset_name": "data.source",
    "dataset_mixture": "data.source",
    "dataset_mixer": "data.source",
    "datasets": "data.source",
    "dataset_config": "data.subset",
    "dataset_train_split": "data.source_split",
    "dataset_splits": "data.source_split",
    "dataset_text_field": "data.columns",
    "chat_template": "data.chat_template",
    "system_prompt": "data.system_prompt",
    "use_bnb_nested_quant": "quantization.bnb_4bit_use_double_quant",
    "run_name": "run.name",
    "output_dir": "run.name",
    **{old: f"train.{new}" for old, new in RENAMES.items()},
}
# Key of a part of a mixture -> key of a recipe's source, in the handbook's names and in TRL's.
_NAMES_OF_PARTS = {
    "id": "source",
    "path": "source",
    "config": "subset",
    "name": "subset",
    "split": "source_split",
    "weight": "weight",
}
# What `datasets` takes for the path of rows in `data_files`.
_BUILDERS = ("json", "csv", "parquet")
# TRL's defaults where PEFT's are others. Source: trl.ModelConfig.
LORA_DEFAULTS = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05}
# Keys of DPOConfig, those of earlier versions too, that no SFTConfig had.
_OF_PAIRS = {
    "beta", "max_prompt_length", "max_completion_length", "precompute_ref_log_probs", "rpo_alpha",
    "ref_model_init_kwargs", "sync_ref_model", "disable_dropout", "label_smoothing", "ld_alpha",
    "f_divergence_type", "generate_during_eval", "reference_free", "model_adapter_name",
}  # fmt: skip
_GONE_OF_PAIRS = {
    "max_prompt_length": "TRL 1 has one limit, train.max_length, and cuts answers alone",
    "max_completion_length": "TRL 1 has one limit, train.max_length",
}
# Keys by which TRL renders conversations, and which do nothing for other rows.
_OF_CONVERSATIONS = ("chat_template", "system_prompt", "assistant_only_loss")
_PAIRS_ARE_ELSEWHERE = """\
# The rows are not on this machine: set prompt_format to what TRL would find in them.
#   chosen and rejected: chat (lists of messages) or raw (texts behind a prompt)"""
_ROWS_ARE_ELSEWHERE = """\
# The rows are not on this machine: set prompt_format to what TRL would find in them.
#   messages: chat, and train.completion_only_loss: false (TRL learns every token of them)
#   prompt and completion: chat (lists of messages) or raw (texts); text: raw"""

# Returns the first row of a source's split on this machine; None where the rows are elsewhere.
FirstRow = Callable[[str, str], Mapping[str, Any] | None]


@dataclass(frozen=True)
class _Rows:
    """How TRL would read the rows. It asks the first one, and so does this."""

    prompt_format: str | None  # None where nothing tells
    why: str
    are_texts: bool = False  # in the column that dataset_text_field names
    has_loss_on_all: bool = False  # TRL learns every token, where a recipe learns the answers
    are_pairs: bool = False


@dataclass
class _Recipe:
    """The recipe as far as it is made; keys are dotted."""

    texts: dict[str, str] = field(default_factory=dict)  # of a key with its comments
    values: Values = field(default_factory=dict)
    are_pairs: bool = False  # stage dpo
    left_out: list[str] = field(default_factory=list)  # lines of comments
    changes: list[str] = field(default_factory=list)

    def add(self, key: str, value: object, why: str) -> None:
        """Add what TRL would fill in, unless the file says it."""
        if key not in self.texts:
            text = value_text(value)
            self.texts[key] = f"# {why}\n{key.partition('.')[2]}: {text}"
            self.changes.append(f"added {key}: {text}; {why}")

    def lines(self) -> list[str]:
        """Return the text of each section, then what was left out."""
        lines: list[str] = []
        if self.are_pairs:
            lines += ["", f"stage: {DPO}"]
        for section in SECTIONS:
            texts = [text for key, text in self.texts.items() if key.startswith(f"{section}.")]
            if texts:
                # a line of spaces too: in a block of text they are part of the value
                indented = re.sub(r"(?m)^(?=.)", "  ", "\n".join(texts))
                lines += ["", f"{section}:", indented]
        if self.left_out:
            lines += ["", "# Left out by `recipes migrate`:"] + self.left_out
        return lines


def migrate(path: Path, target: Path, head: str, first_row: FirstRow) -> tuple[str, list[str]]:
    """Return the recipe of a flat TRL config, which will lie at `target`, and a line per change."""
    flat = read(path)
    if flat.kind != "flat":
        raise wrong_kind(flat, "flat")
    if flat.problems:
        raise RecipeErrors(flat.problems)
    recipe = _Recipe()
    rows = _rows_of(flat, first_row)
    recipe.are_pairs = rows.are_pairs or not flat.values.keys().isdisjoint(_OF_PAIRS)
    section = preference_section() if recipe.are_pairs else TrainSection
    if recipe.are_pairs:
        recipe.changes.append(f"added stage: {DPO}; the config prefers one of two answers")
    # comments stand above the key that they are about
    first_line = min(flat.origin((key,)).line or 0 for key in flat.values)
    comments = [line for line in flat.text.split("\n")[: first_line - 1] if line.startswith("#")]
    for key, value in flat.values.items():
        lines, comments_below = _lines_of(flat, key)
        home = home_of(key, section)
        why = _why_left_out(key, home, flat.values, rows, section)
        if not why and home in recipe.texts:
            why = "another key of this file already sets it"
        if why:
            if is_secret_name(key):
                lines = [f"{key}: (not copied)"]
            recipe.left_out += comments + [f"# {why}:"]
            recipe.left_out += [f"#   {line}" for line in lines]
            recipe.changes.append(f"{flat.origin((key,))}: {key} left out; {why}")
        else:
            name = home.partition(".")[2]
            new_value = _new_value(flat, key, value, target)
            if new_value == value and lines[0].startswith(key):
                # as it was written
                new_lines = [f"{name}{lines[0].removeprefix(key)}"] + lines[1:]
            else:
                new_lines = re.findall(r"\s(#.*)", "\n".join(lines))
                new_lines.append(f"{name}: {value_text(new_value)}")
            recipe.values[home] = new_value
            recipe.texts[home] = "\n".join(comments + new_lines)
            recipe.changes.append(f"{flat.origin((key,))}: {key} -> {home}")
        comments = comments_below
    _add_defaults(recipe, flat.values, rows)
    text = "\n".join([head] + recipe.lines() + comments).lstrip("\n")
    return f"{text}\n", recipe.changes


def home_of(key: str, train: type[Section] = TrainSection) -> str:
    """Return the dotted key of a recipe that a flat key becomes; empty for none. `train` is the
    section of the recipe's stage.
    """
    if key in MOVES:
        return MOVES[key]
    if key in train.model_fields:
        return f"train.{key}"
    if key in QuantizationSection.model_fields:
        return f"quantization.{key}"
    if key.startswith(("lora_", "use_")):
        for name in (key, key.removeprefix("lora_")):
            if name in LoraSection.model_fields:
                return f"lora.{name}"
    return ""


def _lines_of(flat: Document, key: str) -> tuple[list[str], list[str]]:
    """Return a key's lines in the flat file, and the comments between it and the next key."""
    lines = flat.text.split("\n")
    start = flat.origin((key,)).line or 0
    starts = [flat.origin((name,)).line or 0 for name in flat.values]
    end = min((line for line in starts if line > start), default=len(lines) + 1)
    between = lines[start - 1 : end - 1]
    # what is indented still belongs to the key
    size = len(between)
    while size > 1 and between[size - 1][:1] in ("", "#"):
        size -= 1
    return between[:size], [line for line in between[size:] if line]


def _why_left_out(key: str, home: str, flat: Values, rows: _Rows, train: type[Section]) -> str:
    """Return why a recipe does not take a key; empty where it does."""
    if is_secret_name(key):
        return "a secret does not belong in a recipe; use hf auth login"
    if home.startswith("lora.") and not flat.get("use_peft"):
        return "TRL ignores it without use_peft"
    is_quantized = flat.get("load_in_4bit") or flat.get("load_in_8bit")
    if home.startswith("quantization.") and not is_quantized:
        return "nothing is quantized"
    if key == "dataset_text_field" and rows.prompt_format and not rows.are_texts:
        return f"TRL ignores it: the rows are {rows.why}"
    if key in ACTS_WITH and home:
        owner, needed = ACTS_WITH[key]
        values = flat.get(owner)
        if not set(values if isinstance(values, list) else [values]).intersection(needed):
            return f"it acts only with {owner}: {' or '.join(needed)}"
    if home:
        return ""
    if train is not TrainSection and key in _GONE_OF_PAIRS:
        return _GONE_OF_PAIRS[key]
    if key == "use_peft":
        return "the section lora replaces it"
    return train.gone.get(key, "a recipe has no such key")


def _new_value(flat: Document, key: str, value: Any, target: Path) -> Any:
    """Return a value in the form that a recipe at `target` takes."""
    if key == "dataset_name":
        return _moved_source(flat, key, value, target)
    if key == "dataset_splits":  # the handbook's older form: those to train on, then others
        return value[0] if isinstance(value, list) and value else value
    if MOVES.get(key) == "data.source":
        parts = _parts_of_mixture(flat.values)
        if parts is None:
            return value
        for part in parts:
            if isinstance(part, dict) and "source" in part:
                part["source"] = _moved_source(flat, key, part["source"], target)
        return parts
    if key in ("run_name", "output_dir"):
        return re.sub(r"[^A-Za-z0-9._-]+", "-", Path(str(value)).name).strip("-._")[:100]
    if key == "lora_target_modules" and value == ["all-linear"]:
        return "all-linear"
    if key == "dataset_text_field":
        return {"text": value}
    if MOVES.get(key) == "model.dtype" and value is None:
        return "auto"
    if value == "ffd":  # the name of bfd before TRL 0.20
        return "bfd"
    return value


def _moved_source(flat: Document, key: str, name: Any, target: Path) -> Any:
    """Return rows of this machine as a path from the recipe; TRL's begin in its working folder."""
    if not isinstance(name, str) or Path(name).is_absolute():
        return name
    path = Path(flat.absolute(key, name))
    return relative_path(target, path) if path.exists() else name


def _parts_of_mixture(flat: Values) -> list[Any] | None:
    """Return a mixture's parts as a recipe's, of the handbook's two forms or TRL's `datasets`."""
    mixer = flat.get("dataset_mixer")
    if isinstance(mixer, dict):
        return [_part({"id": name, "weight": weight}) for name, weight in mixer.items()]
    mixture = flat.get("dataset_mixture", flat.get("datasets"))
    if isinstance(mixture, dict):
        mixture = mixture.get("datasets")
    if not isinstance(mixture, list):
        return None
    return [_part(part) for part in mixture]


def _part(part: Any) -> Any:
    """Return one part of a mixture in a recipe's words."""
    if not isinstance(part, dict):
        return part
    values = {}
    for name, value in part.items():
        if name in _NAMES_OF_PARTS and value not in (None, 1):
            values[_NAMES_OF_PARTS[name]] = value
    if part.get("path") in _BUILDERS and isinstance(part.get("data_files"), str):
        values["source"] = part["data_files"]
    return values


def _rows_of(flat: Document, first_row: FirstRow) -> _Rows:
    """Return how TRL reads the rows: by the first one, or by what only some rows need."""
    kinds: list[_Rows] = []
    for name, split in _sources(flat):
        row = first_row(name, split)
        kinds.append(_Rows(None, "") if row is None else _rows_like(row, flat.values))
    if kinds and all(kind.prompt_format and kind == kinds[0] for kind in kinds):
        return kinds[0]
    for key in _OF_CONVERSATIONS:
        if flat.values.get(key):
            return _Rows("chat", f"conversations, as {key} is set")
    if "dataset_text_field" in flat.values:
        return _Rows("raw", "texts, as dataset_text_field is set", are_texts=True)
    return _Rows(None, "the rows are not on this machine")


def _sources(flat: Document) -> list[tuple[str, str]]:
    """Return the path or Hub id, and the split, of each source."""
    split = "train"
    for key in ("dataset_train_split", "dataset_splits"):
        if flat.values.get(key):
            split = str(_new_value(flat, key, flat.values[key], flat.path))
    parts: list[Any] = [flat.values.get("dataset_name")]
    key = "dataset_name"
    if parts == [None]:
        parts = _parts_of_mixture(flat.values) or []
        key = "dataset_mixture"
    sources = []
    for part in parts:
        values = part if isinstance(part, dict) else {"source": part}
        name = values.get("source")
        if isinstance(name, str):
            path = flat.absolute(key, name, keep_missing=True)
            sources.append((path, str(values.get("source_split") or split)))
    return sources


def _rows_like(row: Mapping[str, Any], flat: Values) -> _Rows:
    """Return how TRL reads rows like this one. Source: trl.SFTTrainer, which looks for prompt and
    completion first, then for messages, then for the text field.
    """
    if {"chosen", "rejected"} <= row.keys():
        is_text = isinstance(row["chosen"], str)
        why = "pairs of texts" if is_text else "pairs of conversations"
        return _Rows("raw" if is_text and "prompt" in row else "chat", why, are_pairs=True)
    if {"prompt", "completion"} <= row.keys():
        prompt_format = "chat" if isinstance(row["prompt"], list) else "raw"
        return _Rows(prompt_format, "prompt and completion, and TRL learns the completion alone")
    if row.keys() & {"messages", "conversations"}:
        has_loss_on_all = not flat.get("assistant_only_loss")
        return _Rows("chat", "messages", has_loss_on_all=has_loss_on_all)
    if flat.get("dataset_text_field", "text") in row:
        return _Rows("raw", "texts, all of which has loss", are_texts=True)
    return _Rows(None, f"TRL knows no rows with the columns {', '.join(row)}")


def _add_defaults(recipe: _Recipe, flat: Values, rows: _Rows) -> None:
    """Add what TRL fills in where the class behind a section fills in something else."""
    if flat.get("use_peft"):
        for key, value in LORA_DEFAULTS.items():
            recipe.add(f"lora.{key}", value, "TRL's default; PEFT's differs")
    if flat.get("load_in_4bit"):
        recipe.add("quantization.bnb_4bit_quant_type", "nf4", "TRL's default")
        dtype = recipe.values.get("model.dtype")
        if dtype in ("bfloat16", "float16", "float32"):
            why = "TRL computes in the model's dtype"
            recipe.add("quantization.bnb_4bit_compute_dtype", dtype, why)
    if rows.prompt_format is not None:
        recipe.add("data.prompt_format", rows.prompt_format, f"the rows are {rows.why}")
    if rows.has_loss_on_all:
        why = "TRL learns every token of messages; true learns only the answers"
        recipe.add("train.completion_only_loss", False, why)
    split: Values = {"validation": 0.1}
    if recipe.values.get("train.eval_strategy") in ("no", None):
        split = {"method": "none"}
    recipe.add("data.split", split, "rows are held out only if the config evaluates")
    if rows.prompt_format is None:
        text = _PAIRS_ARE_ELSEWHERE if recipe.are_pairs else _ROWS_ARE_ELSEWHERE
        recipe.texts["data.prompt_format"] = text
        recipe.changes.append(f"not written: data.prompt_format; {rows.why}")
