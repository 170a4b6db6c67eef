"""Train and say at the end, on each rank, how often gradients were shared out, and how many bytes
of gradients there were at most, and after each micro-batch: python watched.py RECIPE [...].
"""

from __future__ import annotations

import sys
from typing import Any


def main() -> int:
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group

    from recipes_lib.core.ranks import rank
    from recipes_lib.train import main as train
    from recipes_lib.training import trainer

    exchanges = 0
    groups: list[Any] = []  # of parameters that are gathered and shared out together
    most, after = 0, []
    reduce = _fsdp_param_group.foreach_reduce
    group, model = _fsdp_param_group.FSDPParamGroup, trainer.RecipeTrainer
    made, backward, trained = group.__init__, group.post_backward, model.training_step

    def foreach_reduce(*args: Any) -> Any:
        nonlocal exchanges
        exchanges += 1
        return reduce(*args)

    def remembered(self: Any, *args: Any, **options: Any) -> None:
        made(self, *args, **options)
        groups.append(self)

    def measured(self: Any, *args: Any) -> None:
        nonlocal most
        most = max(most, gradient_bytes(groups))
        backward(self, *args)
        most = max(most, gradient_bytes(groups))

    def training_step(self: Any, *args: Any, **options: Any) -> Any:
        loss = trained(self, *args, **options)
        after.append(gradient_bytes(groups))
        return loss

    group.__init__, group.post_backward = remembered, measured
    model.training_step = training_step
    _fsdp_param_group.foreach_reduce = foreach_reduce
    code = train(sys.argv[1:])
    print(f"rank {rank()}: {exchanges} exchanges", flush=True)
    print(f"rank {rank()}: gradients {most} at most; after {after}", flush=True)
    return code


def gradient_bytes(groups: list[Any]) -> int:
    """Return the bytes of a rank's gradients: whole ones that wait, whole ones of this backward
    pass, and shares.
    """
    found = 0
    for parameter in (one for group in groups for one in group.fsdp_params):
        whole = getattr(parameter, "_unsharded_param", None)
        share = parameter.sharded_param.grad
        kept = (
            parameter.unsharded_accumulated_grad,
            None if whole is None else whole.grad,
            None if share is None else share.to_local(),
        )
        found += sum(one.nbytes for one in kept if one is not None)
    return found


if __name__ == "__main__":
    from recipes_lib.training.process import end_process

    end_process(main())
