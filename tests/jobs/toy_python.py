"""Stands in for the Python of the toy site: trains in no time, and notes what else is run."""

import os
import sys
from pathlib import Path

from tests.study import stand_in


def main() -> int:
    words = sys.argv[1:]
    if "recipes_lib.train" in words:
        recipe = words[words.index("recipes_lib.train") + 1]
        sys.argv = ["train", "", recipe]
        return stand_in.main()
    with Path(os.environ["TOY_LOG"]).open("a") as log:
        log.write(" ".join(words) + "\n")
    if "--look" in words:
        return int(os.environ.get("LOOK_CODE", "0"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
