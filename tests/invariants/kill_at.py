"""Run a training that kills itself at the moment KILL_MOMENT of the step KILL_STEP: python
kill_at.py RECIPE [override ...].
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_in(owner: Any, name: str, when: str, condition: Callable[..., bool]) -> None:
    """Replace `owner.name` by one that dies before, during (a file half written) or after
    its work.
    """
    original = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not condition(*args):
            return original(*args, **kwargs)
        if when == "before":
            die()
        result = original(*args, **kwargs)
        if when == "torn":
            newest = max(
                (path for path in os.scandir(args[1]) if path.is_file()),
                key=lambda path: path.stat().st_mtime_ns,
            )
            os.truncate(newest.path, newest.stat().st_size // 2)
        die()
        return result

    setattr(owner, name, wrapped)


def main() -> int:
    moment, step = os.environ["KILL_MOMENT"], os.environ["KILL_STEP"]
    from transformers import Trainer

    from recipes_lib.train import main as train
    from recipes_lib.training import checkpoints, finish
    from recipes_lib.training.attempt import Attempt
    from recipes_lib.training.trainer import RecipeTrainer

    def at_step(trainer: Any, *rest: Any) -> bool:
        return trainer.state.global_step == int(step)

    def always(*args: Any) -> bool:
        return True

    moments = {
        "in a step": (RecipeTrainer, "_get_grad_norm", "before", at_step),
        "before the weights": (Trainer, "_save", "before", at_step),
        "in the weights": (Trainer, "_save", "torn", at_step),
        "after the weights": (Trainer, "_save", "after", at_step),
        "in the optimizer": (Trainer, "_save_optimizer_and_scheduler", "torn", at_step),
        "after the optimizer": (Trainer, "_save_optimizer_and_scheduler", "after", at_step),
        "in the random state": (Trainer, "_save_rng_state", "torn", at_step),
        "before the marker": (RecipeTrainer, "seal", "before", at_step),
        "before the rotation": (
            checkpoints,
            "rotate",
            "before",
            lambda folder, *rest: (folder / f"checkpoint-{step}").is_dir(),
        ),
        "in the rotation": (
            checkpoints.shutil,
            "rmtree",
            "before",
            lambda path, *rest: "checkpoint-" in str(path),
        ),
        "in the preparation of the data": (Attempt, "continue_or_start", "before", always),
        "before the final save": (finish, "save_and_check", "before", always),
        "before the check of the weights": (finish, "check_saved", "before", always),
        "before the final rename": (finish, "publish", "before", always),
        "after the final rename": (finish, "publish", "after", always),
    }
    kill_in(*moments[moment])
    return train(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
