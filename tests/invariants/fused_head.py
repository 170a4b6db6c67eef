"""Train with the head that a GPU gets, on a CPU: python fused_head.py RECIPE [override ...]. Says
in which precision it multiplies.
"""

from __future__ import annotations

import sys
from typing import Any


def main() -> int:
    from trl.kernels import ChunkedLogProbFunction

    from recipes_lib.train import main as train
    from recipes_lib.training import trainer

    trainer.score_supervised_positions = lambda model: None
    function: Any = ChunkedLogProbFunction
    original, seen = function.forward, set[str]()

    def forward(ctx: Any, hidden: Any, *rest: Any) -> Any:
        if str(hidden.dtype) not in seen:
            seen.add(str(hidden.dtype))
            print(f"fused head: {hidden.dtype}", flush=True)
        return original(ctx, hidden, *rest)

    function.forward = staticmethod(forward)
    return train(sys.argv[1:])


if __name__ == "__main__":
    from recipes_lib.training.process import end_process

    end_process(main())
