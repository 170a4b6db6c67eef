"""What `recipes train` leaves behind, fast; its end: FAIL, REFUSED, CODE, TRAIN_SECONDS, LOSSES."""

import json
import os
import shutil
import sys
import time
from pathlib import Path

from recipes_lib.config.recipe import load_recipe
from recipes_lib.core.run_directory import RunDirectory
from recipes_lib.data.sources import source_hashes
from recipes_lib.training.resume_guard import guarded_values

COMMAND = [sys.executable, "-m", "tests.study.stand_in"]


def main() -> int:
    resolved = Path(sys.argv[2])  # train FILE
    recipe = load_recipe(resolved)
    run = RunDirectory(recipe.name)
    if run.name.endswith(os.environ.get("REFUSED", "nobody")):
        return 2
    world = recipe.launch.gpus or 1
    guard = guarded_values(recipe, "", world, "NO", {})
    run.write_state("running", guard=guard, data_files=source_hashes(recipe.data))
    print("training", run.name, flush=True)
    if folder := os.environ.get("SEEN"):
        note_devices(Path(folder), run.name)
    time.sleep(float(os.environ.get("TRAIN_SECONDS", "0")))
    losses = json.loads(os.environ.get("LOSSES", "{}"))
    loss = losses.get(str(recipe.train.get("learning_rate")), 3.0)
    failing = os.environ.get("FAIL")
    code = 3 if loss is None else int(os.environ.get("CODE", "1"))
    if loss is None or (failing and run.name.endswith(failing)):
        run.write_state("stopped" if code == 75 else "failed", exit_code=code, error="no memory")
        return code
    shutil.copy(resolved, run.path / "resolved.yaml")
    (run.path / "adapter").mkdir()
    (run.path / "adapter" / "adapter_model.safetensors").write_text(f"weights of {recipe}")
    summary = {"seconds": 12.5, "last_validation_loss": loss}
    run.write_state("finished", exit_code=0, guard=guard, summary=summary)
    return 0


def note_devices(folder: Path, name: str) -> None:
    """Note which GPUs this training sees, and which others see one of them at the same time."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    own = set((seen or "").split(","))
    others = [other for other in folder.glob("*.now") if own & set(other.read_text().split(","))]
    now = folder / f"{name}.now"
    now.write_text(seen or "")
    time.sleep(0.5)
    (folder / f"{name}.json").write_text(json.dumps([seen, [other.name for other in others]]))
    now.unlink()


if __name__ == "__main__":
    sys.exit(main())
