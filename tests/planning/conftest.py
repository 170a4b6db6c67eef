"""What autograd really keeps in a training step, measured in the training script itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


@dataclass
class Kept:
    """One forward pass: its tokens, the tokens of a row, and the bytes that autograd kept, weights
    left out.
    """

    tokens: int
    row: int
    bytes: int


@pytest.fixture
def kept_by_autograd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Kept]]:
    """A function that begins to train a recipe and returns what its first two forward
    passes kept.
    """
    import torch

    from recipes_lib import train
    from recipes_lib.core.errors import RecipesError
    from recipes_lib.training.trainer import RecipeTrainer

    monkeypatch.setenv("RECIPES_RUNS_ROOT", str(tmp_path / "runs"))
    original = RecipeTrainer.compute_loss

    def measure(recipe: str, *overrides: str) -> list[Kept]:
        passes: list[Kept] = []

        def compute_loss(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
            batch = {
                value.untyped_storage()._cdata
                for value in inputs.values()
                if isinstance(value, torch.Tensor)
            }
            seen: dict[
                int, torch.Tensor
            ] = {}  # by storage; the tensors themselves, so that no storage is used again

            def pack(tensor: torch.Tensor) -> torch.Tensor:
                key = tensor.untyped_storage()._cdata
                if key not in weights | batch:
                    seen.setdefault(key, tensor)
                return tensor

            ids = inputs["input_ids"]
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                loss = original(self, model, inputs, *args, **kwargs)
            passes.append(
                Kept(
                    ids.numel(),
                    ids.shape[1],
                    sum(tensor.untyped_storage().nbytes() for tensor in seen.values()),
                )
            )
            if len(passes) == 2:
                raise RecipesError("measured")  # nothing else of the training is looked at
            return loss

        monkeypatch.setattr(RecipeTrainer, "compute_loss", compute_loss)
        train.main([recipe, 'train.eval_strategy="no"', *overrides])
        assert len(passes) == 2
        return passes

    return measure
