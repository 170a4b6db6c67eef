"""Run a training with one thing changed that a test watches or needs: python patched.py RECIPE
[override ...], with the name of one of these functions in PATCH.
"""

import hashlib
import os
import pkgutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def fused_head() -> None:
    """Take the head that a GPU gets, on a CPU, and say in which precision it multiplies."""
    from trl.kernels import ChunkedLogProbFunction

    from recipes_lib.training import sft

    sft.score_supervised_positions = lambda model: None
    function: Any = ChunkedLogProbFunction
    original, seen = function.forward, set[str]()

    def forward(ctx: Any, hidden: Any, *rest: Any) -> Any:
        if str(hidden.dtype) not in seen:
            seen.add(str(hidden.dtype))
            print(f"fused head: {hidden.dtype}", flush=True)
        return original(ctx, hidden, *rest)

    function.forward = staticmethod(forward)


def fail_early_on_rank_1() -> None:
    """Fail on rank 1 alone before the first step, as on a machine that lacks a file."""
    from recipes_lib.core.errors import DataError
    from recipes_lib.core.ranks import rank
    from recipes_lib.training import build

    original = build.load_model

    def load_model(*args: Any, **options: Any) -> Any:
        if rank() == 1:
            raise DataError("this machine lacks a file")
        return original(*args, **options)

    build.load_model = load_model


def fail_on_rank_1() -> None:
    """Run out of memory on rank 1 alone, in the third step."""
    import torch

    from recipes_lib.core.ranks import rank
    from recipes_lib.training.sft import SupervisedTrainer

    original = SupervisedTrainer.training_step

    def training_step(self: Any, *args: Any) -> Any:
        if rank() == 1 and self.state.global_step == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, *args)

    SupervisedTrainer.training_step = training_step  # type: ignore[method-assign]


def at_step(trainer: Any, step: int) -> bool:
    return trainer.state.global_step == step


def step_is_there(folder: Path, step: int) -> bool:
    return (folder / f"checkpoint-{step}").is_dir()


def is_checkpoint(path: Path, step: int) -> bool:
    return "checkpoint-" in str(path)


def always(first: Any, step: int) -> bool:
    return True


OURS, TRAINER = "recipes_lib.training", "transformers:Trainer"
# where a training is killed: the owner of a function, its name, before, during (a file half
# written) or after its work, and when, by its first argument
MOMENTS: dict[str, tuple[str, str, str, Callable[[Any, int], bool]]] = {
    "in a step": (f"{OURS}.sft:SupervisedTrainer", "_get_grad_norm", "before", at_step),
    "before the weights": (TRAINER, "_save", "before", at_step),
    "in the weights": (TRAINER, "_save", "torn", at_step),
    "after the weights": (TRAINER, "_save", "after", at_step),
    "in the optimizer": (TRAINER, "_save_optimizer_and_scheduler", "torn", at_step),
    "after the optimizer": (TRAINER, "_save_optimizer_and_scheduler", "after", at_step),
    "in the random state": (TRAINER, "_save_rng_state", "torn", at_step),
    "before the marker": (f"{OURS}.sft:SupervisedTrainer", "seal", "before", at_step),
    "before the rotation": (f"{OURS}.resume_guard", "rotate", "before", step_is_there),
    "in the rotation": ("shutil", "rmtree", "before", is_checkpoint),
    "in the preparation": (f"{OURS}.attempt:Attempt", "continue_or_start", "before", always),
    "before the final save": (f"{OURS}.attempt", "save_and_check", "before", always),
    "before the check": (f"{OURS}.attempt", "check_saved", "before", always),
    "before the final rename": (f"{OURS}.attempt", "publish", "before", always),
    "after the final rename": (f"{OURS}.attempt", "publish", "after", always),
}


def kill() -> None:
    """Die at the moment KILL_MOMENT of the step KILL_STEP."""
    place, name, when, condition = MOMENTS[os.environ["KILL_MOMENT"]]
    owner, step = pkgutil.resolve_name(place), int(os.environ["KILL_STEP"])
    original = getattr(owner, name)

    def wrapped(first: Any, *args: Any, **kwargs: Any) -> Any:
        if not condition(first, step):
            return original(first, *args, **kwargs)
        if when != "before":
            original(first, *args, **kwargs)
        if when == "torn":
            files = [path for path in os.scandir(args[0]) if path.is_file()]
            newest = max(files, key=lambda path: path.stat().st_mtime_ns)
            os.truncate(newest.path, newest.stat().st_size // 2)
        return os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, wrapped)


def reads() -> None:
    """Say on each rank, before the first step, how many bytes of weights it read and what its
    buffers are. READS_BREAK lets rank 0 refuse the model after it has read it.
    """
    from transformers import core_model_loading

    from recipes_lib.core.errors import RecipeError
    from recipes_lib.core.ranks import rank
    from recipes_lib.training import build, sft

    read, said = 0, False
    taken, loaded = core_model_loading._materialize_copy, build.load_model
    trained = sft.SupervisedTrainer.training_step

    def materialize(*args: Any, **options: Any) -> Any:
        nonlocal read
        tensor = taken(*args, **options)
        read += 0 if tensor.is_meta else tensor.nbytes
        return tensor

    def load_model(*args: Any, **options: Any) -> Any:
        model = loaded(*args, **options)
        if "READS_BREAK" in os.environ and rank() == 0:
            raise RecipeError("rank 0 cannot have this model")
        return model

    def training_step(self: Any, *args: Any, **options: Any) -> Any:
        nonlocal said
        if not said:
            digest = hashlib.sha256()
            for name, buffer in self.model.named_buffers():
                digest.update(name.encode() + buffer.cpu().numpy().tobytes())
            empty = sum(one.is_meta for one in self.model.parameters())
            where = f"buffers {digest.hexdigest()}; {empty} empty"
            print(f"rank {rank()}: read {read} bytes; {where}", flush=True)
            said = True
        return trained(self, *args, **options)

    core_model_loading._materialize_copy = materialize
    build.load_model = load_model
    sft.SupervisedTrainer.training_step = training_step


def watched() -> None:
    """Say at the end, on each rank, how often FSDP2 shared gradients out."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group

    from recipes_lib.core.ranks import rank
    from recipes_lib.training.sft import SupervisedTrainer

    exchanges = 0
    reduce: Any = _fsdp_param_group.foreach_reduce
    train: Any = SupervisedTrainer.train

    def foreach_reduce(*args: Any) -> Any:
        nonlocal exchanges
        exchanges += 1
        return reduce(*args)

    def watched_train(self: Any, **words: Any) -> Any:
        ended = train(self, **words)
        print(f"rank {rank()}: {exchanges} exchanges", flush=True)
        return ended

    SupervisedTrainer.train = watched_train  # type: ignore[method-assign]
    _fsdp_param_group.foreach_reduce = foreach_reduce


PATCHES = (fail_early_on_rank_1, fail_on_rank_1, fused_head, kill, reads, watched)

if __name__ == "__main__":
    from recipes_lib.train import main
    from recipes_lib.training.stopping import end_process

    next(patch for patch in PATCHES if patch.__name__ == os.environ["PATCH"])()
    end_process(main(sys.argv[1:]))
