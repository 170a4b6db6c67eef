"""The large libraries under this project: how they are imported and what they print."""

from __future__ import annotations

import atexit
import gc
import resource
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from recipes_lib.core.errors import EnvironmentFault

LIBRARIES_GIB = 2.5  # what a training of a model of 1 MB maps on two cores
# PEFT doubles the rank for the experts' two fused matrices, and then looks for the pattern among
# modules, where no parameter is.
_EXPERTS = r"The following (rank|alpha)_pattern keys did not match .*: \['\.\*.*\.gate_up_proj'\]"


@contextmanager
def importing() -> Iterator[None]:
    """Import large libraries without a search for garbage among their millions of objects: that is
    a quarter of the time of the import, and 0.4 s in every collection afterwards.

    Raises:
        EnvironmentFault: a limit on memory (`ulimit -v`) that the libraries alone go over: OpenBLAS
            waits for ever for memory it does not get.
    """
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY and limit < LIBRARIES_GIB * 2**30:
        raise EnvironmentFault(
            f"out of memory: the limit on address space is {limit / 2**30:.1f} GiB, and the"
            f" libraries alone take {LIBRARIES_GIB} GiB",
            "raise it: ulimit -v unlimited",
        )
    known, collecting = len(sys.modules), gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > known:
            gc.freeze()
            atexit.register(gc.unfreeze)  # Triton reports what the end of the process leaves
        if collecting:
            gc.enable()


def quiet_libraries() -> None:
    """Leave the terminal to this project's own lines; libraries still report errors. Call it before
    torch is imported.
    """
    with importing():
        import datasets
        import transformers

    warnings.filterwarnings("ignore", "", FutureWarning, r"(transformers|trl|peft|torch)\.")
    warnings.filterwarnings("ignore", _EXPERTS)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
