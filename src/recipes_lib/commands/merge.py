"""`recipes merge RUN`: fold an adapter into its base, check the result on real prompts, and keep it
in the run as `merged/`.
"""

from __future__ import annotations

import argparse
import contextlib
import sys

from recipes_lib.core.errors import ExitCode
from recipes_lib.core.libraries import quiet_libraries
from recipes_lib.core.project import shown_path
from recipes_lib.core.run_directory import open_run
from recipes_lib.core.terminal import next_step, say, say_json
from recipes_lib.weights.finished_run import TRUST, finished_run
from recipes_lib.weights.merge import StoredFold, merge


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add("run", metavar="RUN", help="a finished LoRA or QLoRA run")
    dtype = "precision of the merged weights (default: the base's, as it was trained on)"
    add("--dtype", choices=("float32", "bfloat16", "float16"), help=dtype)
    add("--trust-remote-code", action="store_true", help=TRUST)
    printed = "print one JSON object; what happens meanwhile goes to stderr"
    add("--json", action="store_true", help=printed)


def run(args: argparse.Namespace) -> int:
    """Merge, or say that it was done."""
    with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
        trained = finished_run(open_run(args.run), args.trust_remote_code)
        quiet_libraries()
        done = merge(trained, args.dtype, report=say)
    if args.json:
        return say_json({"folder": str(done.folder), "already": done.already, **done.record})
    what = "already merged, nothing to do" if done.already else "merged"
    say(f"{what}: {shown_path(done.folder)} ({done.record['dtype']})")
    say(merge_sentence(done.record["check"]))
    next_step(f"recipes export {args.run} --to DIR --merged")
    return ExitCode.DONE


def merge_sentence(check: StoredFold) -> str:
    """Return the lines that say how a folded adapter compares with the adapter on its base."""
    difference, effect = check["difference"], check["adapter_effect"]
    allowed = difference["tolerance"] * difference["scale"]
    left_out = difference.get("left_out")
    others = (
        f"; the {left_out} positions furthest apart left out, where rounding may have chosen other"
        " experts"
    )
    return (
        f"on {check['prompts']}, computed in {check['computed_in']}:\n  the adapter moves the"
        f" base's logits by {effect['mean']:.3g} on average, {effect['largest']:.3g} at most\n "
        f" merging moves them by {difference['mean']:.3g} on average ({check['lost_share']:.1%} of"
        f" that; allowed {check['lost_limit']:.0%}), {difference['largest']:.3g} at most (allowed"
        f" {allowed:.3g} = {difference['tolerance']:g} of the largest logit)"
        f"{others if left_out else ''}\n  the most likely next token is the same at"
        f" {difference['same_top_token']:.1%} of the positions"
    )
