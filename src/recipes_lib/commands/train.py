"""The verbs around a training: data, plan, train and chat.

`recipes train` prints the plain command, runs it, hands signals on, and returns the exit code that
the launcher would lose.
"""

from __future__ import annotations

import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from recipes_lib.commands import Accelerate, Gpu, Gpus, Json, Nodes, RecipeWord, flag_words
from recipes_lib.commands.recipes import launch_line
from recipes_lib.config.launch import TRAIN_FLAGS, Launch, place_machine, plan_launch
from recipes_lib.config.recipe import Recipe, load_recipe
from recipes_lib.core.environment import quiet_libraries
from recipes_lib.core.errors import ExitCode, RecipeError, RecipeErrors
from recipes_lib.core.files import object_or_none
from recipes_lib.core.project import shown_path
from recipes_lib.core.run_directory import RunDirectory, is_held, open_run
from recipes_lib.core.terminal import aligned, next_step, print_json, say
from recipes_lib.data.conversations import Message
from recipes_lib.data.leaks import NUM_KEPT
from recipes_lib.data.prompts import generation_prompt
from recipes_lib.evals.engine import HFEngine, Request, Sampling
from recipes_lib.evals.leaks import leak_error, search_recipe
from recipes_lib.evals.recipe import load_eval
from recipes_lib.plan.cards import card_named
from recipes_lib.training.stopping import EXIT_CODE_FILE, STOPPING, handling
from recipes_lib.weights.load import load_tokenizer
from recipes_lib.weights.runs import BASE, TRUST, Family, families, finished_run

if TYPE_CHECKING:
    from recipes_lib.data.prepare import DataAudit

_POLL_S = 0.1
_LETTING_GO_S = 5.0  # a killed rank takes a moment to let go of the run

# ---- data ----


def run_data(
    recipe: RecipeWord,
    overrides: Sequence[str] = (),
    *,
    show: Annotated[int, "print N training rows as the model sees them (default 3)", 0] = 3,
    against: Annotated[list[str], "evals whose questions must not be in the training rows"] = [],
) -> int:
    """Prepare the recipe's data, print the audit and some rows."""
    from recipes_lib.data.prepare import prepare_data

    # an override may follow the evals
    words = [*overrides, *(word for word in against if "=" in word)]
    loaded = load_recipe(recipe, words)
    evals = [load_eval(word) for word in against if "=" not in word]
    quiet_libraries()
    tokenizer = load_tokenizer(loaded)
    data = prepare_data(loaded, tokenizer)
    _say_audit(data.audit, f" (split: {data.splits['method']})")
    leaks_of = search_recipe(loaded, evals, fetch=True) if evals else {}
    for name, leaks in leaks_of.items():
        say(str(leak_error(name, leaks, loaded)) if leaks.found else leaks.summary(name))
    if wrong := [name for name, leaks in leaks_of.items() if leaks.is_error]:
        raise RecipeErrors(
            leak_error(name, leaks_of[name], loaded, limit=NUM_KEPT) for name in wrong
        )
    for row in data.train.select(range(min(show, len(data.train)))):
        _show_row(row, tokenizer)
    say()
    return next_step("train", recipe, *words)


def _say_audit(audit: DataAudit, split: str = "") -> None:
    rows = audit.rows
    filtered = f", {rows['too_long']} filtered by max_tokens" if rows["too_long"] else ""
    say(f"{rows['read']} rows read{filtered}, {rows['used']} used")
    say(f"{rows['train']} train / {rows['validation']} validation / {rows['test']} test{split}")
    form = f"prompt format {audit.prompt_format}, loss on the {audit.loss_on}"
    say(form, *audit.notes)
    keys = ("total", "median", "max")
    cells = [[title, *(f"{of[key]:,}" for key in keys)] for title, of in audit.tokens.items()]
    say("", *aligned([("tokens", *keys), *cells]))
    for note in audit.warnings:
        say(f"note: {note}")


def _show_row(row: Mapping[str, Any], tokenizer: Any) -> None:
    """Print one training row: text with loss in [[...]], the end token marked."""
    from recipes_lib.data.prepare import IGNORED, decoded_spans

    num_supervised = sum(label != IGNORED for label in row["labels"])
    say(f"\n-- {row['example_id']}: {len(row['input_ids'])} tokens, {num_supervised} with loss")
    spans = decoded_spans(tokenizer, row["input_ids"], row["labels"])
    say("".join(f"[[{text}]]" if has_loss else text for text, has_loss in spans).rstrip())


# ---- plan ----


def run_plan(
    recipe: RecipeWord,
    overrides: Sequence[str],
    *,
    gpu: Gpu = None,
    gpus: Gpus = None,
    nodes: Nodes = None,
    accelerate: Accelerate = None,
    table: Annotated[bool, "compare other settings, methods and cards"] = False,
    json: Json = False,
) -> int:
    """Plan and print."""
    if gpu not in (None, "cpu"):
        card_named(gpu)  # an unknown card is refused before torch is imported
    loaded = load_recipe(recipe, overrides)
    quiet_libraries()
    from recipes_lib.plan.plan import advise, launch_and_card, plan_of, rows_shown
    from recipes_lib.plan.plan import table as table_lines

    given = {"accelerate": accelerate, "gpus": gpus, "nodes": nodes}
    plan = plan_of(loaded, *launch_and_card(loaded, gpu, **given))
    advice = advise(plan, overrides)
    rows = rows_shown(plan, advice)
    if json:
        return print_json({key: value for _, _, values in rows for key, value in values.items()})
    lines = [f"{label:<9} {text}" for label, text, _ in rows if text]
    say(*lines, *(table_lines(plan, overrides) if table else ()))
    path = shown_path(loaded.path)
    say(f"$ {launch_line(plan.launch, path, overrides)}")
    if advice and "launch." in advice[0]:
        given = {}  # a flag would win over it
    words = [path, *(f"--{name}={value}" for name, value in given.items() if value), *overrides]
    if plan.fits:
        return next_step("train", *words)
    if advice is None:
        return next_step("ls")
    card = [f"--gpu={gpu}"] if gpu else []
    return next_step("plan", *words, *card, *shlex.split(advice[0]))


# ---- train ----


def run_train(
    recipe: RecipeWord,
    overrides: Sequence[str],
    debug: bool,
    typed: Sequence[str],
    *,
    accelerate: Accelerate = None,
    gpus: Gpus = None,
    nodes: Nodes = None,
    machine_rank: Annotated[int | None, "several machines: this one's number, from 0", 0] = None,
    main_process_ip: Annotated[str | None, "several machines: address of machine 0"] = None,
    main_process_port: Annotated[int | None, "several machines: port of machine 0"] = None,
    dry_run: Annotated[bool, "only print the command"] = False,
    resume_anyway: Annotated[bool, TRAIN_FLAGS["resume_anyway"]] = False,
    trust_remote_code: Annotated[bool, TRAIN_FLAGS["trust_remote_code"]] = False,
) -> int:
    """Launch, wait, and return the training's own exit code."""
    loaded = load_recipe(recipe, overrides)
    launch = plan_launch(loaded.launch, accelerate, gpus, nodes)
    launch = place_machine(launch, machine_rank, main_process_ip, main_process_port)
    again = [word for word in typed if word != "--dry-run"]
    flags = flag_words(
        resume_anyway=resume_anyway, trust_remote_code=trust_remote_code, debug=debug
    )
    command = launch.command(["-m", "recipes_lib.train", recipe, *overrides, *flags])
    say(f"$ {shlex.join(command)}")
    if dry_run:
        return next_step(*again)
    if launch.rank:
        say(f"machine {launch.rank} of {launch.machines}: the training prints on machine 0")
    code = supervise(command, loaded, launch)
    if code in (ExitCode.PREEMPTED, ExitCode.INTERRUPTED):
        next_step(*again)
    return code


def supervise(command: list[str], recipe: Recipe, launch: Launch) -> int:
    """Run the command in a session of its own and return what the training script reported.

    A first Ctrl-C or SIGTERM asks for a checkpoint through the STOP file: the launcher would kill
    its ranks 30 s after a signal. A second one ends everything at once; so does the first before
    the first step.
    """
    run = RunDirectory(recipe.name)
    earlier = _steps_began(run)
    signals: list[int] = []
    answered, killed = 0, ""
    with (
        tempfile.TemporaryDirectory() as folder,
        handling(lambda number, frame: signals.append(number)),
    ):
        report = Path(folder) / "exit_code"
        environment = {**os.environ, EXIT_CODE_FILE: str(report)}
        launcher = subprocess.Popen(command, env=environment, start_new_session=True)
        while launcher.poll() is None:
            for number in signals[answered:]:
                answered += 1
                word = "interrupted" if signal.SIGINT in signals else "stopped"
                if signals.count(number) > 1 and number != signal.SIGUSR2:
                    killed = f"{word} at once"
                elif _steps_began(run) in (None, earlier):
                    killed = f"{word} before the first step"
                else:
                    say(STOPPING)
                    with suppress(OSError):  # on a full disk only a second signal helps
                        run.stop_file.write_text("INT" if number == signal.SIGINT else "")
            if killed:
                shutil.rmtree(folder)  # a rank that finds it gone does not begin
                os.killpg(launcher.pid, signal.SIGKILL)
                launcher.wait()
            time.sleep(_POLL_S)
        text = report.read_text("utf-8") if report.is_file() else ""
        if text.isdecimal():
            return int(text)
        # rank 0 cannot report where the disk is full or it was killed
        code = max(launcher.returncode, 0) or ExitCode.FAILED
        if killed:
            code = ExitCode.INTERRUPTED if signal.SIGINT in signals else ExitCode.PREEMPTED
        if not launch.rank:
            by_another = launcher.returncode == -signal.SIGKILL
            why = "was killed (out of memory?)" if by_another else "ended without saying why"
            _record_end(run, killed, f"the training {why}", code)
        return code


def _steps_began(run: RunDirectory) -> str | None:
    """Return when the newest attempt's first step began; None if none has."""
    state = object_or_none(run.state_file) or {}
    return state.get("steps_began") if state.get("state") == "running" else None


def _record_end(run: RunDirectory, killed: str, ended: str, code: int) -> None:
    """Record how a training ended that could not do so itself, unless another process holds it."""
    end = time.monotonic() + _LETTING_GO_S
    while is_held(run.path) and time.monotonic() < end:
        time.sleep(_POLL_S)
    what = killed or ended
    if run.exists() and run.read_state()["state"] == "running" and not is_held(run.path):
        run.write_state("stopped" if killed else "failed", exit_code=code, error=what)
    elif not killed:
        return
    say(f"{what} (exit {code}); the same command resumes, from a checkpoint if there is one")


# ---- chat ----


def run_chat(
    runs: Annotated[list[str], "finished runs"],
    *,
    prompt: Annotated[str | None, "answer this question and exit"] = None,
    system: Annotated[str | None, "system prompt, in place of the recipe's"] = None,
    max_new_tokens: Annotated[int, "longest answer (default 200)"] = 200,
    temperature: Annotated[float, "0 is greedy and repeatable (default)"] = 0.0,
    trust_remote_code: Annotated[bool, TRUST] = False,
) -> int:
    """Load every run once and answer until the input ends."""
    if not 0 <= temperature < float("inf"):
        raise RecipeError("recipes chat: --temperature must be 0 or more")
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature)
    trained = [finished_run(open_run(name), trust_remote_code) for name in dict.fromkeys(runs)]
    quiet_libraries()
    loaded = [Family(group) for group in families(trained)]
    begin: list[Message] = [{"role": "system", "content": system}] if system else []
    # each model reads its own earlier answers
    conversations = [(family, name, [*begin]) for family in loaded for name in family.names]
    for question in [prompt] if prompt is not None else _questions():
        for family, name, messages in conversations:
            messages.append({"role": "user", "content": question})
            text = answer(family, name, messages, sampling)
            messages.append({"role": "assistant", "content": text})
            recipe, title = family.recipe, name
            if name == BASE and len(loaded) > 1:
                form = f" in {recipe.base_format}" if recipe.base_format else ""
                title = f"{name} {recipe.model.name_or_path}{form}"
            say(f"{title}\n{text or '(empty answer)'}\n")
    return next_step("export", runs[0], "--to", f"{trained[0].run.name}-export")


def answer(family: Family, name: str, messages: Sequence[Message], sampling: Sampling) -> str:
    """Return the next answer, asked in the run's prompt format (the base: as the first run)."""
    from recipes_lib.data.prepare import prompt_ids

    section, tokenizer = family.prompting(name)
    prompt = generation_prompt(section, tokenizer, messages=messages)
    ids, seed = tuple(prompt_ids(section, tokenizer, prompt)), random.getrandbits(31)
    engine = HFEngine(partial(family.answering, name), tokenizer, "")
    (done,) = engine.complete([Request(key=name, ids=ids, seed=seed)], sampling)
    if done.finish_reason == "prompt_too_long":
        raise RecipeError("the conversation is longer than the model can read: start a new one")
    return done.text


def _questions() -> Iterator[str]:
    """Yield lines of the input until an empty one."""
    mark = "> " if sys.stdin.isatty() else ""
    if mark:
        say("type a question; an empty line or Ctrl-D ends")
    print(mark, end="", flush=True)
    while line := sys.stdin.readline().strip():
        yield line
        print(mark, end="", flush=True)
