"""What goes wrong for a user: one hierarchy of exceptions, one form of message, one exit code each.
Any other exception is a defect; `--debug` shows its traceback.
"""

import enum
import errno
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from recipes_lib.core.terminal import for_stream, mask_secrets


class ExitCode(enum.IntEnum):
    """Exit codes of `recipes VERB` and `python -m recipes_lib.train`; run.json records the same."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    NUMERICS = 3
    DATA = 4
    ENVIRONMENT = 5
    EVALUATION_INCOMPLETE = 6
    PREEMPTED = 75
    INTERRUPTED = 130


class RecipesError(Exception):
    """An error the user can act on: one line that says what is wrong, with the file and line that
    it is about, and hints: what to do, the nearest name, the arithmetic.
    """

    exit_code = ExitCode.FAILED

    def __init__(
        self, what: str, *hints: str, file: str | Path | None = None, line: int | None = None
    ) -> None:
        super().__init__(what)
        self.what = what
        self.hints = hints
        self.file = file
        self.line = line

    def __reduce__(self) -> tuple[Any, ...]:
        # An error goes to the other ranks as it is. Pickle's own way would call `__init__` with
        # `args`, which a subclass with other parameters does not take.
        return _error_of, (type(self), self.args, vars(self))

    def __str__(self) -> str:
        first = self.what
        if self.file is not None:
            place = self.file if self.line is None else f"{self.file}:{self.line}"
            first = f"{place}: {first}"
        return mask_secrets("\n  ".join([first.strip(), *self.hints]))


def _error_of(kind: type[RecipesError], args: Any, attributes: dict[str, Any]) -> RecipesError:
    """Return an error of this class with these attributes, made without its `__init__`."""
    error = kind.__new__(kind)
    error.args = args
    vars(error).update(attributes)
    return error


class RecipeError(RecipesError):
    """Wrong usage, or a recipe (or another YAML of ours) that cannot be accepted."""

    exit_code = ExitCode.USAGE
    _errors: list | None = None

    @property
    def errors(self) -> list["RecipeError"]:
        """The errors that it stands for: itself, or several."""
        return self._errors or [self]


class RecipeErrors(RecipeError):
    """Several errors reported together, in the order of file and line."""

    def __init__(self, errors: Iterable[RecipesError]) -> None:
        self._errors = sorted(errors, key=lambda error: (str(error.file or ""), error.line or 0))
        super().__init__(f"{len(self._errors)} errors")
        self.exit_code = min(error.exit_code for error in self._errors)

    def __str__(self) -> str:
        return "\n".join(map(str, self.errors))


class NumericsError(RecipesError):
    """A loss or a gradient that is not finite."""

    exit_code = ExitCode.NUMERICS


class DataError(RecipesError):
    """Rows, files or columns that cannot be used."""

    exit_code = ExitCode.DATA


class EnvironmentFault(RecipesError):
    """The machine: device, driver, disk, network, gated model, another process on the same run."""

    exit_code = ExitCode.ENVIRONMENT


def one_line(error: BaseException) -> str:
    """Return another library's error on one line of at most 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    if len(text) > 300:
        return f"{text[:297]}..."
    return text


def print_error(error: BaseException | str) -> None:
    """Print an error or a warning on stderr, where it does not get into what --json prints."""
    print(for_stream(str(error), sys.stderr), file=sys.stderr, flush=True)


# what Python, torch, tokenizers, safetensors and datasets say of a disk or of memory
_FAULT = re.compile(
    "No space left on device|Disk quota exceeded|File too large|StorageFull|unexpected pos"
    r"|PytorchStreamWriter|Read-only file system|Input/output error|\(os error |Os \{ code: "
    "|(annot|an't|Unable to|could not) allocate|not enough memory|bad_alloc|MemoryError"
    "|failed to map segment|can't start new thread|iostream error"
)


_PACKAGE = Path(__file__).resolve().parents[1]
# What takes less of a GPU's memory, by what was done when it was full: each verb has other keys.
_ON_CPU = "or on the CPU: CUDA_VISIBLE_DEVICES= before the command"
_SMALLER = {
    "train": "halve train.per_device_train_batch_size; train.activation_checkpointing: true",
    "merge": f"end what else uses the GPU (nvidia-smi), {_ON_CPU}",
    "chat": f"fewer runs at once, a shorter --max-new-tokens, {_ON_CPU}",
    "eval": f"lower generation.max_new_tokens, in lm_eval suite.batch_size, {_ON_CPU}",
    "judge": f"a smaller judge, or one behind a server (judges/openai-compatible.yaml), {_ON_CPU}",
}


def missing_extra(error: BaseException) -> EnvironmentFault | None:
    """Return the error that names the extra of a module that is not installed; None for others."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        # importlib.metadata, which would add half to the time of `recipes --help`
        from recipes_lib.core.extras import extras

        module = error.name.partition(".")[0]
        for extra in extras():
            if module.replace("_", "-") in extra.missing:
                hint = f"the extra {extra.name} brings it: {extra.install}"
                return EnvironmentFault(f"{module} is not installed, and is needed here", hint)
    return None


def explain_fault(error: BaseException, verb: str = "train") -> EnvironmentFault | None:
    """Translate an out-of-memory or I/O error, or one whose cause is such an error, into one that
    says what to do: each verb can make other things smaller. None for other errors.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, RecipesError):  # those say it themselves
        text = one_line(cause)
        if type(cause).__name__ == "OutOfMemoryError":  # torch's, which is not imported for this
            remedy = _SMALLER.get(verb, f"end what else uses the GPU, {_ON_CPU}")
            return EnvironmentFault(f"out of GPU memory: {text}", remedy)
        missing = missing_extra(cause)
        if missing is not None:
            return missing
        filename = cause.filename if isinstance(cause, FileNotFoundError) else None
        # for a file of this package no disk and no user is to blame
        if isinstance(filename, str | Path) and Path(filename).is_relative_to(_PACKAGE):
            what = f"this installation is not whole: {filename} is missing"
            return EnvironmentFault(what, "install the package again: pip install recipes-lib")
        number = error.errno if cause is error and isinstance(error, OSError) else None
        if number or _FAULT.search(text):
            remedy = "free space (disk, quota, job memory) or make the file accessible, then rerun"
            if number == errno.ENAMETOOLONG:
                remedy = "use a shorter name"
            return EnvironmentFault(f"cannot read, write or allocate: {text}", remedy)
        # as Python prints them: an error raised `from None` has no cause
        context = None if cause.__suppress_context__ else cause.__context__
        cause = cause.__cause__ or context
    return None
