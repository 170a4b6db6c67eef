"""Train and say at the end, on each rank, how often gradients were shared out and into how many
pieces each micro-batch was cut: python watched.py RECIPE [override ...].
"""

from __future__ import annotations

import sys
from typing import Any


def main() -> int:
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group

    from recipes_lib.core.ranks import rank
    from recipes_lib.train import main as train
    from recipes_lib.training import trainer

    exchanges, pieces = 0, []
    reduce, split = _fsdp_param_group.foreach_reduce, trainer.split_batch

    def foreach_reduce(*args: Any) -> Any:
        nonlocal exchanges
        exchanges += 1
        return reduce(*args)

    def split_batch(*args: Any) -> list[dict[str, Any]]:
        found = split(*args)
        pieces.append(len(found))
        return found

    _fsdp_param_group.foreach_reduce = foreach_reduce
    trainer.split_batch = split_batch
    code = train(sys.argv[1:])
    print(f"rank {rank()}: {exchanges} exchanges; pieces {pieces}", flush=True)
    return code


if __name__ == "__main__":
    from recipes_lib.training.process import end_process

    end_process(main())
