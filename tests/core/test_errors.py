"""A full disk, a disk that refuses and memory that ran out are told as such, whoever noticed:
Python, tokenizers, safetensors or torch.
"""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from recipes_lib.core.errors import (
    EnvironmentFault,
    ExitCode,
    RecipeError,
    check_space,
    explain_fault,
    is_disk_full,
)


@pytest.mark.parametrize(
    ("number", "what", "remedy"),
    [
        (errno.ENOSPC, "disk full: reason (/a/file)", "free some space, then run"),
        (errno.EDQUOT, "disk full: reason (/a/file)", "free some space, then run"),
        (
            errno.EFBIG,
            "the limit on the size of a file is reached: reason (/a/file)",
            "ulimit -f unlimited",
        ),
        (
            errno.EROFS,
            "the disk does not read or write: reason (/a/file)",
            "make it writable again",
        ),
        (
            errno.EACCES,
            "cannot read or write: reason (/a/file)",
            "make it accessible again",
        ),
        (
            errno.ESTALE,
            "cannot read or write: reason (/a/file)",
            "make it accessible again",
        ),
        (
            errno.EISDIR,
            "cannot read or write: reason (/a/file)",
            "move away what is in the way, then run",
        ),
        (errno.EIO, "the disk does not read or write: reason (/a/file)", "dmesg"),
        (errno.ELOOP, "cannot read or write: reason (/a/file)", "make it accessible"),
        (errno.ENOMEM, "out of memory: reason (/a/file)", "ulimit -v"),
    ],
)
def test_an_error_with_a_number_says_what_to_do(number: int, what: str, remedy: str) -> None:
    fault = explain_fault(OSError(number, "reason", "/a/file"))
    assert fault is not None and fault.exit_code == ExitCode.ENVIRONMENT
    assert what in str(fault) and remedy in str(fault)


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (Exception("No space left on device (os error 28)"), "disk full"),
        (
            RuntimeError(
                "[enforce fail at inline_container.cc:672] . unexpected pos 186432 vs 186324"
            ),
            "disk full",
        ),
        (
            RuntimeError(
                "Error while serializing: I/O error: Os { code: 27, kind: FileTooLarge, message:"
                ' "File too large" }'
            ),
            "limit on the size",
        ),
        (Exception("Read-only file system (os error 30)"), "does not read or write"),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:119] . DefaultCPUAllocator: can't allocate memory:"
                " you tried"
            ),
            "out of memory",
        ),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), "out of memory"),
        (MemoryError(), "out of memory: MemoryError"),
    ],
    ids=[
        "tokenizers",
        "torch",
        "safetensors",
        "read-only",
        "torch memory",
        "import",
        "Python memory",
    ],
)
def test_an_error_of_a_library_is_known_by_its_text(error: Exception, what: str) -> None:
    fault = explain_fault(error)
    assert fault is not None and what in fault.what and fault.exit_code == ExitCode.ENVIRONMENT


def test_what_an_error_was_raised_from_counts() -> None:
    try:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as full:
            raise ValueError("generating the dataset failed") from full
    except ValueError as error:
        fault = explain_fault(error)
    assert fault is not None and "disk full" in fault.what


def test_other_errors_are_left_alone() -> None:
    assert explain_fault(ValueError("no")) is None
    assert explain_fault(FileNotFoundError(errno.ENOENT, "No such file or directory", "x")) is None
    assert explain_fault(RecipeError("the file system is full: No space left on device")) is None
    assert not is_disk_full(ValueError("no"))
    try:
        try:
            raise PermissionError(errno.EACCES, "Permission denied", "/cache")
        except PermissionError:
            {}["key"]
    except KeyError as error:
        assert explain_fault(error) is None


def test_a_limit_on_address_space_that_the_libraries_go_over_is_refused_before_they_are_imported() -> (  # noqa: E501
    None
):
    """In a process of its own: a limit cannot be taken back. A library would wait for ever for what
    it does not get.
    """
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31)); from"
        " recipes_lib.train import main; code = main([sys.argv[1]]); assert 'torch' not in"
        " sys.modules; sys.exit(code)"
    )
    recipe = Path(__file__).resolve().parents[2] / "recipes" / "quickstart" / "lora-r8.yaml"
    done = subprocess.run(
        [sys.executable, "-c", code, str(recipe)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == ExitCode.ENVIRONMENT, done.stderr
    assert (
        done.stderr
        == "out of memory: the limit on address space is 2.0 GiB, and the libraries alone take 2.5"
        " GiB\n  raise it: ulimit -v unlimited\n"
    )


def test_a_full_disk_is_noticed_before_a_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100 * 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    check_space(tmp_path, 80 * 2**20, "a save", "")
    with pytest.raises(EnvironmentFault, match="disk full: a save needs 90 MiB"):
        check_space(tmp_path, 90 * 2**20, "a save", "")


def test_a_small_save_is_not_said_to_need_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=12_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(EnvironmentFault, match=r"needs 146 KiB \(and 20% spare\), 12 KiB are free"):
        check_space(tmp_path, 150_000, "a save", "")
