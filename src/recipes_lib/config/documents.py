"""YAML files with all that they extend, and where each value was written. Needs no pydantic."""

import difflib
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from recipes_lib.core.errors import EnvironmentFault, ExitCode, RecipeError
from recipes_lib.core.project import project_root, recipe_path, shown_path
from recipes_lib.core.terminal import holds_secret, is_secret_name

KeyPath = tuple[str | int, ...]
Values = dict[str, Any]  # of a YAML mapping
COMMAND_LINE = "command line"
SECTIONS = ("model", "quantization", "lora", "data", "train", "run", "launch")
STAGE = "stage"  # the one top-level key of a recipe that is no section
# Sections whose keys go to a server as they are, and into every record of what was asked.
_SECTIONS_OF_SERVERS = ("judge", "generation")

# YAML 1.2: `no`, `010` and `1:30` are text, `2e-5` is a number.
_TAG = "tag:yaml.org,2002:"
_TAGS = [f"{_TAG}{name}" for name in ("str", "int", "float", "bool", "null", "map", "seq")]
_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_Loader: Any = type("_Loader", (_Base,), {"yaml_implicit_resolvers": {}})
for _name, _pattern in {
    "bool": r"(?i:true|false)\Z",
    "null": r"(?:~|(?i:null)|)\Z",
    "int": r"[-+]?(?:0|[1-9]\d{0,29})\Z",  # longer ones are text; no key takes such a number
    "float": r"(?:[-+]?(?:(?:0|[1-9]\d*)(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?|[-+]?\.inf|\.nan)\Z",
}.items():
    _Loader.add_implicit_resolver(f"{_TAG}{_name}", re.compile(_pattern), [None])

# What configs of other programs have, and those of other kinds of training.
_FOREIGN_KEYS = (
    "base_model", "finetuning_type", "checkpointer", "peft", "reward_funcs", "num_generations",
    "desirable_weight", "cpo_alpha", "simpo_gamma",
)  # fmt: skip
# Kind of a file -> its top-level keys. A file is of the first kind that has one of its keys.
KINDS: dict[str, tuple[str, ...]] = {
    "eval": ("suite", "generation"),
    "study": ("question", "factors", "arms", "seeds", "tune"),
    "profile": ("sbatch", "stages", "setup", "srun", "max_requeues"),
    "judge": ("judge", "thresholds"),
    "lm_eval_task": ("task", "output_type", "doc_to_text"),
    "foreign": _FOREIGN_KEYS,
    "recipe": SECTIONS,
    "accelerate": ("compute_environment", "distributed_type"),
    "flat": ("model_name_or_path", "dataset_name", "output_dir"),
}
_HINTS = {
    "foreign": "configs of axolotl, LLaMA-Factory, oumi, torchtune and GRPO are not supported",
    "flat": "recipes migrate turns a flat TRL config into a recipe",
    "study": "use recipes study",
    "eval": "use recipes eval",
    "recipe": "to train it: recipes train; its results: recipes compare RUN",
    "profile": "it says how Slurm runs a recipe: recipes launch RECIPE --profile FILE",
    "judge": "an eval recipe extends it; to audit it: recipes judge audit --judge FILE",
    "accelerate": "it says how a recipe is launched: recipes train RECIPE --accelerate FILE",
}
_ALL_RECIPES = "all recipes: recipes ls; evals are in evals/, studies in recipes/studies/"
_ROWS = "to train on rows: recipes new NAME --from RECIPE --data FILE"
# Short names that other programs give to keys of a recipe.
SHORT_NAMES = {
    "lr": "train.learning_rate",
    "epochs": "train.num_train_epochs",
    "batch_size": "train.per_device_train_batch_size",
    "model_name_or_path": "model.name_or_path",
    "base_model": "model.name_or_path",
    "dataset": "data.source",
    "output_dir": "run.name",
    **dict.fromkeys(("rank", "lora_r", "lora_rank"), "lora.r"),
    **dict.fromkeys(("max_seq_length", "cutoff_len", "sequence_len"), "train.max_length"),
}
# The key of a section that a value is meant for where somebody gives one to the whole section.
MAIN_KEYS = {"model": "name_or_path", "data": "source", "lora": "r", "run": "name"}


class MissingRows(RecipeError):
    """A key names a file of rows that does not exist: a fault of the data, as `data.source`'s."""

    exit_code = ExitCode.DATA


@dataclass(frozen=True)
class Origin:
    """Where a value was written; no line on the command line."""

    file: str
    line: int | None = None

    def __str__(self) -> str:
        return self.file if self.line is None else f"{self.file}:{self.line}"


@dataclass
class Document:
    """The merged values of a file, what it extends and the command line."""

    path: Path
    values: Any = None
    text: str = ""
    origins: dict[KeyPath, Origin] = field(default_factory=dict)  # of every key and list item
    problems: list[RecipeError] = field(default_factory=list)  # of the YAML: `parse` reports them

    @cached_property
    def file(self) -> str:
        """The path as a user would type it; asked for once for each value."""
        return shown_path(self.path)

    @property
    def is_base(self) -> bool:
        """Whether recipes extend it, and required keys may be missing: its name starts with `_`."""
        return self.path.name.startswith("_")

    @property
    def kind(self) -> str:
        """The file's kind by its top-level keys, empty for none."""
        if not self.values:
            raise RecipeError("is empty", _ROWS, file=self.file)
        if not isinstance(self.values, dict):
            raise RecipeError("is not a mapping of keys", _ROWS, file=self.file)
        for kind, keys in KINDS.items():
            if not self.values.keys().isdisjoint(keys):
                is_of_another_program = kind == "flat" and STAGE in self.values
                return "foreign" if is_of_another_program else kind
        return ""

    def origin(self, key: str | KeyPath | int) -> Origin:
        """Return where a key (`"lora.r"`, `("lora", "r")`) or line is, else the nearest around."""
        if isinstance(key, int):
            return Origin(self.file, None if self.file == COMMAND_LINE else key)
        path = tuple(key.split(".")) if isinstance(key, str) else key
        for length in range(len(path), 0, -1):
            if path[:length] in self.origins:
                return self.origins[path[:length]]
        for inner_path, origin in self.origins.items():
            if inner_path[: len(path)] == path:
                return origin
        return Origin(self.file)

    def error(self, key: str | KeyPath | int, what: str, *hints: str) -> RecipeError:
        """Return an error at the place of a key or on a line."""
        origin = self.origin(key)
        return RecipeError(what, *hints, file=origin.file, line=origin.line)

    def fault(self, key: str, what: str, *hints: str) -> EnvironmentFault:
        """Return an error of the machine, placed where a key needs what the machine has not."""
        origin = self.origin(key)
        return EnvironmentFault(what, *hints, file=origin.file, line=origin.line)

    def absolute(self, key: str | KeyPath, name: str, *, keep_missing: bool = False) -> str:
        """Return the absolute path of a file that a key names: looked for beside the file that
        wrote the key, then in the working directory and the project; where there is none, the
        first, or with `keep_missing` the name itself.
        """
        if keep_missing and len(name) > 255:  # a whole template: no file has such a name
            return name
        beside = Path(self.origin(key).file).parent  # that of the command line is `.`
        candidates = [root / Path(name).expanduser() for root in (beside, Path(), project_root())]
        existing = [path for path in candidates if path.exists()]
        if keep_missing and not existing:
            return name
        path = existing[0] if existing else candidates[0]
        # links among the folders are followed, for the sake of `..`; the file keeps its name
        return str(path.parent.resolve() / path.name)


def read(path: str | Path, overrides: Sequence[str] = ()) -> Document:
    """Read a YAML file, what it extends and `section.key=value` words.

    Mappings merge key by key, lists and scalars replace, `null` sets null. Several parents are
    applied in the order given, each file once.
    """
    path = recipe_path(path)
    files = _with_parents(path, ())
    document = Document(path, text=files[-1].text)
    # two parents may extend the same file
    files_once = {part.path.resolve(): part for part in files}
    for part in list(files_once.values()) + read_words(overrides):
        if isinstance(part.values, dict) and isinstance(document.values, dict):
            _merge(document, document.values, part.values, ())
        else:
            document.values = part.values
        document.origins |= part.origins
        document.problems += part.problems
    return document


def _with_parents(path: Path, below: tuple[Path, ...]) -> list[Document]:
    """Return the files that `path` extends, then itself."""
    part = _read_file(path)
    circle = below + (path.resolve(),)
    names = part.values.pop("extends", []) if isinstance(part.values, dict) else []
    if not isinstance(names, list):
        names = [names]
    parts: list[Document] = []
    for name in map(str, names):
        beside = path.parent / name
        parent = beside if beside.is_file() else recipe_path(name)
        if ".." in Path(name).parts:  # the links among its folders are followed first
            parent = parent.parent.resolve() / parent.name
        if not parent.is_file():
            what = f"extends a file that does not exist: {name}"
            raise part.error("extends", what, *near_file(beside))
        if parent.resolve() in circle:
            steps = " -> ".join(step.name for step in circle + (parent,))
            raise part.error("extends", f"circular extends: {steps}")
        parts += _with_parents(parent, circle)
    return parts + [part]


def _merge(document: Document, into: Values, new: Values, at: KeyPath) -> None:
    """Merge values into those of a document at a key path."""
    for key, value in new.items():
        path = at + (key,)
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(document, into[key], value, path)
            continue
        into[key] = value
        # what stood inside the replaced value stands nowhere now
        for inner in list(document.origins):
            if inner[: len(path)] == path:
                del document.origins[inner]


def read_words(words: Sequence[str]) -> list[Document]:
    """Return a document for each `section.key=value`, with its one value in nested mappings."""
    documents: list[Document] = []
    for number, word in enumerate(words):
        name, separator, text = word.removeprefix("--").partition("=")
        keys = name.split(".")
        document = Document(Path(COMMAND_LINE), text=text)
        if not separator or not all(keys):
            what = f"'{word}' is not section.key=value"
            raise document.error(1, what, _hint_of_word(words, number))
        document.origins[tuple(keys)] = document.origin(1)
        _compose(document, tuple(keys))
        for key in reversed(keys):
            document.values = {key: document.values}
        documents.append(document)
    return documents


def _hint_of_word(words: Sequence[str], number: int) -> str:
    """Return what to type instead of a word that is no `section.key=value`, by its neighbours."""
    word = words[number]
    before = words[number - 1] if number else ""
    after = words[number + 1] if number + 1 < len(words) else ""
    name = word.lstrip("-").replace("-", "_")
    if name.startswith("resume"):
        return "the same command resumes a run that was stopped"
    if word.startswith("-"):
        key = SHORT_NAMES.get(name, f"train.{name}")
        value = after if after and not after.startswith("-") else "VALUE"
        return f"keys of a recipe have no dashes and no spaces: {key}={value}; flags: --help"
    if after.startswith("="):
        value = after[1:] or "".join(words[number + 2 : number + 3])
        return f"write it without spaces: {word}={value}"
    if before.endswith("="):
        return f"write it without spaces: {before}{word}"
    if ":" in word:
        return f"write it with =: {word.replace(':', '=', 1)}"
    if recipe_path(word).is_file():
        kind = _read_file(recipe_path(word)).kind
        if kind != "recipe" and kind in _HINTS:
            return _HINTS[kind]
        return "one recipe at a time; several are a study: recipes study --help"
    return "write key and value in one word, for example train.learning_rate=1e-4"


def _read_file(path: Path) -> Document:
    document = Document(path)
    if not path.exists():
        raise no_such_file(path)
    if not path.is_file():  # a pipe or a device may never end
        raise RecipeError("is not a file", _ALL_RECIPES, file=path)
    if path.suffix in (".md", ".txt", ".py", ".jinja"):
        raise RecipeError("is not YAML", _ALL_RECIPES, file=document.file)
    if path.suffix in (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet"):
        raise RecipeError("is a file of rows, not YAML", _ROWS, file=document.file)
    if path.stat().st_size > 10_000_000:  # 30 MB of comments took 19 s to read
        raise RecipeError("is larger than 10 MB: not a recipe", _ROWS, file=document.file)
    try:
        document.text = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise document.error(line, "is not UTF-8 text; save it as UTF-8") from None
    _compose(document, ())
    return document


def _compose(document: Document, at: KeyPath) -> None:
    """Set a document's values from its text, which is what stands at a key."""
    for number, row in enumerate(document.text.split("\n"), start=1):
        if holds_secret(row):
            what = "this looks like a secret; a recipe must not hold one"
            hint = "log in with 'hf auth login', or export a variable; revoke what was committed"
            document.problems.append(document.error(number, what, hint))
    try:
        node = yaml.compose(document.text, Loader=_Loader)
    except yaml.YAMLError as error:
        context = getattr(error, "context", None) or ""
        mark = getattr(error, "problem_mark", None)
        if "flow" in context or "scanning" in context:
            # an open quote or bracket is wrong where it begins
            mark = getattr(error, "context_mark", None)
        what = f"YAML: {context} {getattr(error, 'problem', error)}"
        hints = ["indent with spaces; YAML allows no tabs"] if "\t" in document.text else []
        line = mark.line + 1 if mark else 1
        raise document.error(line, " ".join(what.split()), *hints) from None
    if node is not None:
        document.values = _build(document, node, at)


def _build(document: Document, node: yaml.Node, at: KeyPath) -> Any:
    """Return the value of a node; note the place of each key and item in it, and what is wrong."""
    line = node.start_mark.line + 1
    document.origins.setdefault(at, document.origin(line))
    if len(document.origins) > 100_000 or len(at) > 100:  # an alias may hold itself
        raise document.error(line, "too many values, or nested too deeply")
    has_text = isinstance(node, yaml.ScalarNode) and node.value not in ("", "null", "~")
    if has_text and at and at[0] in _SECTIONS_OF_SERVERS and is_secret_name(str(at[-1])):
        what = f"{dotted(at)} is a secret; a recipe must not hold one"
        hint = f"export a variable, and name it in {at[0]}.api_key_variable"
        document.problems.append(document.error(line, what, hint))
    if node.tag not in _TAGS:
        raise document.error(line, "YAML tags are not allowed")
    if isinstance(node, yaml.SequenceNode):
        return [_build(document, item, at + (index,)) for index, item in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        values: Values = {}
        for key_node, value_node in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else "?"
            path = at + (key,)
            line = key_node.start_mark.line + 1
            if key in values:
                what = f"duplicate key '{dotted(path)}', also at {document.origins[path]}"
                document.problems.append(document.error(line, what))
            document.origins[path] = document.origin(line)
            values[key] = _build(document, value_node, path)
        return values
    return yaml.constructor.SafeConstructor().construct_object(node)


def relative_path(target: Path, file: Path) -> str:
    """Return the path of a file as one that will lie at `target` must write it."""
    return Path(os.path.relpath(file.resolve(), target.resolve().parent)).as_posix()


def dotted(path: KeyPath) -> str:
    """Return a key path as it is written on the command line."""
    return ".".join(map(str, path))


def value_text(value: Any, longest: int = 10**9) -> str:
    """Return a value as YAML on one line, cut at `longest` characters."""
    options: Values = {"default_flow_style": True, "sort_keys": False, "allow_unicode": True}
    # no other white space is stripped: a value may begin or end with it
    text = str(yaml.safe_dump(value, width=10**9, **options)).strip("\n").removesuffix("\n...")
    if len(text) > longest:
        return f"{text[: longest - 3]}..."
    return text


def did_you_mean(word: str, names: Iterable[str], show: Callable[[str], object] = str) -> list[str]:
    """Return the hint `did you mean X?` as a list, of none if no name is near; `show` makes X."""
    near = difflib.get_close_matches(word, list(names), 1, cutoff=0.65)
    return [f"did you mean {show(name)}?" for name in near]


def near_file(path: Path) -> list[str]:
    """Return the hint `did you mean X?` for a file that does not exist."""
    stems = {file.stem: shown_path(file) for file in sorted(path.parent.glob("*"))}
    inside = sorted((project_root() / "recipes" / path).glob("[!_]*.yaml"))
    if inside:  # the folder of a model's recipes
        return [f"did you mean {path / inside[0].stem}?"]
    return did_you_mean(path.stem, stems, stems.get)


def no_such_file(path: Path) -> RecipeError:
    """Return the error for a file that does not exist, with one of a similar name."""
    hints = near_file(path) + [_ALL_RECIPES]
    return RecipeError("no such file or recipe", *hints, file=shown_path(path))


def wrong_kind(document: Document, expected: str) -> RecipeError:
    """Return the error for a file of another kind than was asked for."""
    kind = document.kind
    keys = value_text(list(document.values), 200)
    what = f"expected a YAML of kind {expected}, found {kind or 'unknown'}: its keys are {keys}"
    return RecipeError(what, _HINTS.get(kind, _ALL_RECIPES), file=document.file)
