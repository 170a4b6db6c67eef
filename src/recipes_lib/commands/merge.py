"""`recipes merge RUN`: fold an adapter into its base, and keep the checked result as `merged/`."""

from __future__ import annotations

from typing import Annotated, Literal

from recipes_lib.core.environment import quiet_libraries
from recipes_lib.core.project import shown_path
from recipes_lib.core.run_directory import open_run
from recipes_lib.core.terminal import next_step, say
from recipes_lib.weights.merge import LOST_LIMIT, merge
from recipes_lib.weights.runs import TRUST, finished_run

Dtype = Literal["float32", "bfloat16", "float16"]


def run(
    run: Annotated[str, "a finished LoRA or QLoRA run"],
    *,
    dtype: Annotated[Dtype | None, "precision of the merged weights; default: the base's"] = None,
    trust_remote_code: Annotated[bool, TRUST] = False,
) -> int:
    """Merge, or say that it was done."""
    trained = finished_run(open_run(run), trust_remote_code)
    quiet_libraries()
    record, was_there = merge(trained, dtype)
    what = "already merged, nothing to do" if was_there else "merged"
    say(f"{what}: {shown_path(trained.merged)} ({record.dtype})")
    say(
        f"the adapter moves the base's logits by {record.effect:.3g} on average; merging moves"
        f" them by {record.difference:.3g}, which is {record.lost:.1%} of that (allowed"
        f" {LOST_LIMIT:.0%})"
    )
    return next_step("recipes", "export", run, "--to", f"{trained.run.name}-merged", "--merged")
