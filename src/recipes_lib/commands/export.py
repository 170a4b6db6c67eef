"""`recipes export RUN --to DIR`: a folder to give away, and to the Hub if asked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from recipes_lib.core.run_directory import open_run
from recipes_lib.core.terminal import next_step, say, shown_size
from recipes_lib.weights.export import export, push
from recipes_lib.weights.runs import finished_run


def run(
    run: Annotated[str, "a finished run: LoRA, QLoRA or full fine-tuning"],
    *,
    to: Annotated[Path, "the folder to write, for example my-first-export; a new or empty one"],
    merged: Annotated[bool, "the merged model (recipes merge RUN) instead of the adapter"] = False,
    push_to_hub: Annotated[str | None, "OWNER/NAME: export, and upload the folder"] = None,
    public: Annotated[bool, "make a new repository public (default: private)"] = False,
) -> int:
    """Export, and push if asked; no model is loaded."""
    files = export(finished_run(open_run(run), remote_code=True), to, merged)
    size = shown_size(sum(file.stat().st_size for file in files))
    say(f"exported {len(files)} files, {size}: {to}")
    for file in files:
        say(f"  {file.name}")
    if push_to_hub:
        say(f"pushed: {push(to.expanduser(), push_to_hub, public)}")
    return next_step("less", to / "README.md")
