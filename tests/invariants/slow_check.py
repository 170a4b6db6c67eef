"""Train with a final check of the weights that takes SLOW_CHECK_S seconds more: python
slow_check.py RECIPE [override ...].
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any


def main() -> int:
    from recipes_lib.train import main as train
    from recipes_lib.weights import check

    original = check.recorded_hashes

    def recorded_hashes(*arguments: Any) -> dict[str, str]:
        time.sleep(float(os.environ["SLOW_CHECK_S"]))
        return original(*arguments)

    check.recorded_hashes = recorded_hashes
    return train(sys.argv[1:])


if __name__ == "__main__":
    from recipes_lib.training.process import end_process

    end_process(main())
