"""A recipe reduced to what data preparation reads, so that these tests need no YAML; and the
tokenizers they use.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from recipes_lib.config.recipe import SFT, DataSection, Stage
from recipes_lib.core.errors import RecipeError


@dataclass
class DataRecipe:
    """Stands for a resolved recipe."""

    data: DataSection
    train: dict[str, Any] = field(default_factory=dict)
    stage: Stage = SFT

    def error(self, key: str, what: str, *hints: str) -> RecipeError:
        line = 1 + ("data", "train", "model").index(key.split(".")[0])
        return RecipeError(what, *hints, file="recipe.yaml", line=line)


@pytest.fixture
def recipe_for():
    """Build a recipe from a source and keys of `data`; `train` holds the training keys."""

    def build(
        source: Any, *, train: dict[str, Any] | None = None, stage: Stage = SFT, **data: Any
    ) -> DataRecipe:
        source = str(source) if isinstance(source, Path) else source
        section = DataSection(source=source, **data)
        return DataRecipe(section, {"max_length": 1024} | (train or {}), stage)

    return build


@pytest.fixture
def write_jsonl(tmp_path: Path):
    """Write rows to a JSON Lines file in the test's folder."""

    def write(rows: list[Any], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


def task_rows(count: int) -> list[dict[str, str]]:
    """Different rows in Dolly's schema; one in three has a context."""
    return [
        {
            "instruction": f"What is {i} plus {i}?",
            "context": f"Adding {i} to itself doubles it." if i % 3 == 1 else "",
            "response": f"It is {2 * i}.\nThat is twice {i}.",
        }
        for i in range(count)
    ]


@pytest.fixture
def tasks():
    return task_rows


@pytest.fixture(scope="session")
def smollm2_tokenizer():
    """The quickstart model's tokenizer."""
    from transformers import AutoTokenizer

    from recipes_lib.models.packaged import packaged_folder

    folder = packaged_folder() or pytest.skip("the quickstart's model is not in .cache/models")
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def trl_rows(tmp_path: Path):
    """What TRL's own trainer makes of rows: a list of `{input_ids, labels}`."""

    def prepare(
        rows: list[dict[str, Any]], tokenizer: Any, **train: Any
    ) -> list[dict[str, list[int]]]:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        trainer = SFTTrainer.__new__(SFTTrainer)  # preparing rows needs no model
        args = SFTConfig(
            output_dir=str(tmp_path / "trl"), use_cpu=True, bf16=False, report_to=[], **train
        )
        trainer._tokenizer, trainer.chat_template = tokenizer, tokenizer.chat_template
        whole = train.get("completion_only_loss") is False
        trainer.completion_only_loss = "completion" in rows[0] and not whole
        data = Dataset.from_list(rows)
        prepared = trainer._prepare_dataset(data, tokenizer, args, False, None, "train")
        return prepared.select_columns(["input_ids", "labels"]).to_list()

    return prepare
