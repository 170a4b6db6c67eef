"""`recipes merge` and `recipes export`: a run's weights as they are used elsewhere."""

from pathlib import Path
from typing import Annotated, Literal

from recipes_lib.core.environment import quiet_libraries
from recipes_lib.core.project import shown_path
from recipes_lib.core.run_directory import open_run
from recipes_lib.core.terminal import next_step, say
from recipes_lib.weights.export import export, push
from recipes_lib.weights.merge import LOST_LIMIT, merge
from recipes_lib.weights.runs import TRUST, finished_run

Dtype = Literal["float32", "bfloat16", "float16"]


def run_merge(
    run: Annotated[str, "a finished LoRA or QLoRA run"],
    *,
    dtype: Annotated[Dtype | None, "precision of the merged weights; default: the base's"] = None,
    trust_remote_code: Annotated[bool, TRUST] = False,
) -> int:
    """Fold an adapter into its base, and keep the checked result as `merged/`."""
    trained = finished_run(open_run(run), trust_remote_code)
    quiet_libraries()
    record, was_there = merge(trained, dtype)
    what = "already merged, nothing to do" if was_there else "merged"
    say(f"{what}: {shown_path(trained.merged)} ({record['dtype']})")
    say(
        f"the adapter moves the base's logits by {record['effect']:.3g} on average; merging moves"
        f" them by {record['difference']:.3g}, which is {record['lost']:.1%} of that (allowed"
        f" {LOST_LIMIT:.0%})"
    )
    return next_step("export", run, "--to", f"{trained.run.name}-merged", "--merged")


def run_export(
    run: Annotated[str, "a finished run: LoRA, QLoRA or full fine-tuning"],
    *,
    to: Annotated[Path, "the new or empty folder to write, for example my-first-export"],
    merged: Annotated[bool, "the merged model (recipes merge RUN) instead of the adapter"] = False,
    push_to_hub: Annotated[str | None, "OWNER/NAME: export, and upload the folder"] = None,
    public: Annotated[bool, "make a new repository public (default: private)"] = False,
) -> int:
    """Export, and push if asked; no model is loaded."""
    files = export(finished_run(open_run(run), remote_code=True), to, merged)
    mib = sum(file.stat().st_size for file in files) / 2**20
    say(f"exported {len(files)} files, {mib:,.1f} MiB: {to}")
    say(*(f"  {file.name}" for file in files))
    if push_to_hub:
        say(f"pushed: {push(to.expanduser(), push_to_hub, public)}")
    return next_step(to / "README.md", program="less")
