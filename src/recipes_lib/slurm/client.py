"""Slurm's commands, and what they say."""

import os
import re
import subprocess
from collections.abc import Sequence

from recipes_lib.core.errors import EnvironmentFault

_OF_THE_SITE = {"SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT"}
_UNREACHABLE = re.compile("contact slurm controller|connect|configuration source|timed out", re.I)


def run_slurm(argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's commands, as if in no job; raise EnvironmentFault if Slurm is away."""
    environment = dict(os.environ, LC_ALL="C")
    for name in os.environ:
        if name.startswith("SLURM_") and name not in _OF_THE_SITE:
            del environment[name]
    try:
        done = subprocess.run(list(argv), capture_output=True, text=True, env=environment)
    except FileNotFoundError:
        hints = ("log in to the cluster's login node", "to see what would run: --dry-run")
        raise EnvironmentFault(f"{argv[0]} is not on this machine", *hints) from None
    if done.returncode and _UNREACHABLE.search(done.stderr):
        hint = "is this the login node, and is the controller up? sinfo"
        raise EnvironmentFault(f"Slurm does not answer: {last_words(done.stderr)}", hint)
    return done


def last_words(text: str) -> str:
    """Return the reason that one of Slurm's commands gives for its failure."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("Try ")]
    if not lines:
        return "no reason given"
    return lines[-1].rpartition("error: ")[2]
