"""Train with a validation of one batch per second, as `recipes_lib.train` does otherwise."""

from __future__ import annotations

import sys
import time
from typing import Any


def main() -> int:
    from recipes_lib.train import main as train
    from recipes_lib.training.trainer import RunCallback

    original: Any = RunCallback.on_prediction_step

    def on_prediction_step(*args: Any, **kwargs: Any) -> Any:
        time.sleep(1)
        return original(*args, **kwargs)

    RunCallback.on_prediction_step = on_prediction_step
    return train(sys.argv[1:])


if __name__ == "__main__":
    from recipes_lib.training.process import end_process

    end_process(main())
