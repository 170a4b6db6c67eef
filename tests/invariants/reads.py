"""Train and say on each rank, before the first step, how many bytes of weights it read and what its
buffers are: python reads.py RECIPE [override ...].

READS_BREAK=recipe lets rank 0 refuse the model after it has read it.
"""

from __future__ import annotations

import hashlib
import os
import sys
from typing import Any


def main() -> int:
    from torch import Tensor
    from transformers import core_model_loading

    from recipes_lib.core.errors import RecipeError
    from recipes_lib.core.ranks import rank
    from recipes_lib.train import main as train
    from recipes_lib.training import reading, trainer

    read, said = 0, False
    taken, loaded = core_model_loading._materialize_copy, reading.load_model
    trained = trainer.RecipeTrainer.training_step

    def materialize(*args: Any, **options: Any) -> Tensor:
        nonlocal read
        tensor = taken(*args, **options)
        read += 0 if tensor.is_meta else tensor.nbytes
        return tensor

    def load_model(*args: Any, **options: Any) -> Any:
        model, how = loaded(*args, **options), os.environ.get("READS_BREAK")
        if how == "recipe" and rank() == 0:
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
    reading.load_model = load_model
    trainer.RecipeTrainer.training_step = training_step
    return train(sys.argv[1:])


if __name__ == "__main__":
    from recipes_lib.training.process import end_process

    end_process(main())
