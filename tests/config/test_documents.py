"""The two calls every YAML file goes through: read with places, then parsed as a model."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from recipes_lib.config.documents import Document, read
from recipes_lib.config.parsing import Section, parse


class Inner(Section):
    rate: float | None = None
    count: int = Field(1, ge=1)
    when: Literal["no", "steps"] = "no"


class Outer(Section):
    inner: Inner = Inner()
    names: list[str] = []


def test_numbers_and_words_are_read_as_yaml_1_2_does(write) -> None:
    path = write("inner: {rate: 2e-5, when: no}\nnames: [no, '16', 010, 1:30, x]\n", "a.yaml")
    parsed = parse(Outer, read(path))
    assert (parsed.inner.rate, parsed.inner.when) == (2e-5, "no")
    assert parsed.names == ["no", "16", "010", "1:30", "x"]


def test_a_diamond_of_parents_is_read_once_each_and_every_value_has_its_place(write) -> None:
    write("inner: {count: 1, rate: 1}\n", "top.yaml")
    write("extends: top.yaml\ninner:\n  count: 2\n", "left.yaml")
    write("extends: top.yaml\nnames: [a]\n", "right.yaml")
    path = write("extends: [left.yaml, right.yaml]\nnames:\n- b\n", "a.yaml")
    document = read(path, ["inner.when=no"])
    parsed = parse(Outer, document)
    assert (parsed.inner.count, parsed.names) == (2, ["b"])
    places = {"inner.count": "left.yaml:3", "names": "a.yaml:2", "inner.when": "command line"}
    assert {key: str(document.origin(key)) for key in places} == places


KINDS = [
    ({"lora": {}}, "sub/_b.yaml", "recipe"),
    ({"distributed_type": "NO"}, "ddp.yaml", "accelerate"),
    ({"model_name_or_path": "a"}, "old.yaml", "flat"),
    ({"model": {}, "learning_rate": 1}, "r.yaml", "recipe"),
    ({"model": {}, "data": {}, "training": {"seed": 1}}, "r.yaml", "recipe"),
    ({"suite": {}, "judge": {}}, "e.yaml", "eval"),
    ({"model_name_or_path": "a", "finetuning_type": "lora"}, "r.yaml", "foreign"),
    ({"model_name_or_path": "a", "beta": 0.1}, "r.yaml", "flat"),
    ({"model_name_or_path": "a", "beta": 0.1, "cpo_alpha": 1.0}, "r.yaml", "foreign"),
    ({"model_name_or_path": "a", "stage": "dpo"}, "r.yaml", "foreign"),
    ({"stage": "dpo", "model": {}}, "r.yaml", "recipe"),
    ({"model_name_or_path": "a", "reward_funcs": ["accuracy"]}, "r.yaml", "foreign"),
    ({"model": {"_component_": "a"}, "checkpointer": {}}, "r.yaml", "foreign"),
]


def test_a_file_tells_its_kind_by_its_keys() -> None:
    wrong = [case for case in KINDS if Document(Path(case[1]), case[0]).kind != case[2]]
    assert not wrong
