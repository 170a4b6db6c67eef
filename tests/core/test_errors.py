"""A full disk, a disk that refuses and memory that ran out are explained, whoever noticed."""

import errno
import importlib
import os
import pickle
import pkgutil

import recipes_lib
from recipes_lib.config.documents import MissingRows
from recipes_lib.core.errors import ExitCode, RecipeError, RecipeErrors, RecipesError, explain_fault
from recipes_lib.data.errors import BadRow, SettingError


class OutOfMemoryError(RuntimeError):
    """As torch's, by its name."""


WRAPPED = ValueError("generating the dataset failed")
WRAPPED.__cause__ = OSError(errno.ENOSPC, "No space left on device")
FAULTS = (
    *(OSError(number, os.strerror(number)) for number in (errno.ENOSPC, errno.EDQUOT)),
    Exception("No space left on device (os error 28)"),  # tokenizers
    RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 32"),
    RuntimeError('I/O error: Os { code: 27, message: "File too large" }'),  # safetensors
    WRAPPED,
    Exception("Read-only file system (os error 30)"),
    PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/a/file"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
    ImportError("libtorch_cpu.so: failed to map segment from shared object"),
    RuntimeError("basic_ios::clear: iostream error"),  # torch's writer of small files
    MemoryError(),
)


def test_a_fault_of_the_machine_says_what_it_is_and_what_to_do() -> None:
    for error in FAULTS:
        fault = explain_fault(error)
        assert fault and "cannot read, write or allocate" in fault.what and fault.hints, error
        assert fault.exit_code == ExitCode.ENVIRONMENT
    fault = explain_fault(OutOfMemoryError("CUDA out of memory"))
    assert fault and "out of GPU memory" in fault.what
    fault = explain_fault(OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), 300 * "x"))
    assert fault and "shorter name" in fault.hints[0]


def test_out_of_memory_names_what_the_verb_can_change() -> None:
    full = OutOfMemoryError("CUDA out of memory")
    for verb, words in (
        ("train", "per_device_train_batch_size"),
        ("merge", "CUDA_VISIBLE_DEVICES="),
        ("chat", "--max-new-tokens"),
        ("eval", "generation.max_new_tokens"),
        ("judge", "server"),
        ("study", "end what else uses the GPU"),
    ):
        fault = explain_fault(full, verb)
        assert fault and words in fault.hints[0], verb
        assert ("train." in fault.hints[0]) == (verb == "train"), verb


def test_other_errors_are_left_alone() -> None:
    tried = KeyError("key")
    tried.__context__ = PermissionError(errno.EACCES, "Permission denied", "/cache")
    ours = RecipeError("the file system is full: No space left on device")
    for error in (ValueError("no"), ours, tried):
        assert explain_fault(error) is None


def all_subclasses(kind: type) -> set[type]:
    """Every class below one, however deep."""
    direct = kind.__subclasses__()
    return {*direct}.union(*map(all_subclasses, direct))


def test_every_error_reaches_the_other_ranks_as_it_is() -> None:
    for module in pkgutil.walk_packages(recipes_lib.__path__, "recipes_lib."):
        if "templates" not in module.name:
            importlib.import_module(module.name)
    made_otherwise = {
        RecipeErrors: lambda: RecipeErrors([SettingError("data.columns", "no column")]),
        SettingError: lambda: SettingError("data.columns", "no column 'x'", "columns: a, b"),
    }
    kinds = all_subclasses(RecipesError)
    assert {SettingError, BadRow, MissingRows} <= kinds
    for kind in kinds:
        make = made_otherwise.get(kind, lambda kind=kind: kind("what", "a hint", file="f", line=3))
        error = make()
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is kind
        assert str(copy) == str(error)
        assert copy.exit_code == error.exit_code
        assert vars(copy).keys() == vars(error).keys()


def test_several_errors_are_in_the_order_of_their_places_and_survive_pickling() -> None:
    second = RecipeError("second", "do this", file="a.yaml", line=7)
    errors = RecipeErrors([second, RecipeError("first")])
    for copy in (errors, pickle.loads(pickle.dumps(errors))):
        assert str(copy) == "first\na.yaml:7: second\n  do this"
        assert copy.exit_code == ExitCode.USAGE
