"""Mixtures with weights, in the shape of smoltalk2 (a folder of splits as Parquet, rows with
template arguments) and of the Tulu 3 mixture (ids, messages, source).
"""

from __future__ import annotations

from collections import Counter

import pyarrow
import pytest
from pyarrow import parquet

from recipes_lib.commands.data import _summary
from recipes_lib.core.errors import DataError
from recipes_lib.data.preparation import prepare_data
from recipes_lib.data.splits import recorded_rows, training_rows

TEMPLATE = (
    "{{ '/think' if enable_thinking | default(true) else '/no_think' }}"
    "{% for message in messages %}<|{{ message.role }}|>{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}{% else %}"
    "{{ message.content }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def turns(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.fixture
def smoltalk2(tmp_path):
    """Two files, one with thoughts and one without, as its splits are."""
    for name, thinks in (("think", True), ("no_think", False)):
        rows = [
            {
                "messages": turns(
                    f"{name} {i}?", f"<think>Hm {i}.</think>{i}" if thinks else f"{i}"
                ),
                "chat_template_kwargs": {
                    "enable_thinking": thinks,
                    "custom_instructions": "Be brief." if i % 2 else None,
                    "python_tools": None,
                },
                "source": name,
            }
            for i in range(40)
        ]
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
    return tmp_path


@pytest.fixture
def mix(recipe_for, tiny_tokenizer):
    def prepare(source, **keys):
        keys = {"split": {"validation": 0.1}, "chat_template": TEMPLATE} | keys
        recipe = recipe_for(source, prompt_format="chat", **keys)
        return recipe.data, prepare_data(recipe, tiny_tokenizer)

    return prepare


def test_a_smoltalk2_mixture_takes_a_share_of_each_source_and_counts_it(
    mix, smoltalk2, tiny_tokenizer
):
    source = [
        {"source": str(smoltalk2 / "think.parquet"), "weight": 0.25},
        {"source": str(smoltalk2 / "no_think.parquet"), "weight": 1},
    ]
    _, data = mix(source)
    think, no_think = data.audit["sources"]
    assert (think["rows"], think["used"], no_think["rows"], no_think["used"]) == (40, 10, 40, 40)
    assert think["train"] + think["validation"] == 10 and think["supervised"] > 0
    assert data.audit["rows"]["used"] == 50
    texts = [tiny_tokenizer.decode(row["input_ids"]) for row in data.train.to_list()]
    assert sum("/think" in text for text in texts) == think["train"]
    assert all(("/no_think" in text) == ("no_think" in text.split("|>")[1]) for text in texts)
    again = mix(source)[1]
    assert again.fingerprint == data.fingerprint
    other = mix([{**source[0], "weight": 0.5}, source[1]])[1]
    assert {*data.splits["train"]["ids"]} < {
        *other.splits["train"]["ids"],
        *other.splits["validation"]["ids"],
    }
    row = next(line for line in _summary(data.audit) if "/think.parquet" in line).split()
    assert row[1:4] == ["40", "0.25", "10"]


def test_a_tulu_3_mixture_repeats_training_rows_alone(mix, write_jsonl):
    def rows(name, count):
        return [
            {"id": f"{name}_{i}", "messages": turns(f"{name} {i}?", f"{i}."), "source": name}
            for i in range(count)
        ]

    source = [
        {"source": str(write_jsonl(rows("flan", 30), "flan.jsonl")), "weight": 1.0},
        {"source": str(write_jsonl(rows("gsm", 20), "gsm.jsonl")), "weight": 2.5},
    ]
    section, data = mix(source)
    times = Counter(data.train["example_id"])
    gsm = [count for name, count in times.items() if name.startswith("1:")]
    assert set(gsm) == {2, 3} and sum(gsm) == round(2.5 * len(gsm))
    assert {count for name, count in times.items() if name.startswith("0:")} == {1}
    assert max(Counter(data.validation["example_id"]).values()) == 1
    assert not {*data.validation["example_id"]} & {*times}
    flan, gsm = data.audit["sources"]
    assert (flan["train"] + gsm["train"]) == len(data.train) == data.audit["rows"]["train"]
    assert data.audit["duplicates"]["exact_rows"] == 0 and data.audit["rows"]["used"] == 50
    found = recorded_rows(section, data.splits, data.fingerprint)
    assert len(found) == len(training_rows(section)) == len(times)
    assert len(list(found.with_texts())) == len(times)


def test_a_weight_that_leaves_no_row_names_the_source(mix, smoltalk2):
    no_think = {"source": str(smoltalk2 / "no_think.parquet"), "weight": 0.001}
    source = [str(smoltalk2 / "think.parquet"), no_think]
    with pytest.raises(DataError, match=r"source\[1\]\.weight: 0\.001 of 40 rows is no row"):
        mix(source)
