"""recipes doctor: is this machine ready? One line per finding, with the remedy."""

from __future__ import annotations

import argparse
import os
from functools import partial
from pathlib import Path

from recipes_lib import diagnosis
from recipes_lib.core.errors import ExitCode
from recipes_lib.core.project import project_root, runs_root
from recipes_lib.core.terminal import next_step, say


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments: there are none."""


def run(args: argparse.Namespace) -> int:
    """Print the findings; exit 5 when something cannot work."""
    del args
    hub = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    folders = {"runs": (runs_root(), 5), "Hub cache (Llama-2-7B takes 13)": (hub, 15)}
    findings = diagnosis.diagnose(
        {
            "python": diagnosis.check_python,
            "versions": partial(diagnosis.check_versions, project_root() / "constraints.txt"),
            "gpu": diagnosis.check_devices,
            "bf16": diagnosis.check_bf16,
            "attention": diagnosis.check_attention,
            "optional": diagnosis.check_optional,
            "bitsandbytes": diagnosis.check_bitsandbytes,
            "quickstart": diagnosis.check_quickstart_model,
            "hub": diagnosis.check_hub,
            "disk": partial(diagnosis.check_disk, folders),
            "launcher": diagnosis.check_launcher,
        }
    )
    for finding in findings:
        say(str(finding))
    broken = [finding for finding in findings if finding.level == "fail"]
    if broken:
        next_step(f"{broken[0].remedy or 'mend the first failure'}; then recipes doctor")
        return int(ExitCode.ENVIRONMENT)
    next_step("recipes ls")
    return int(ExitCode.DONE)
