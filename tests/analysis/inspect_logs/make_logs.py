"""Makes the logs of this folder with Inspect AI: python make_logs.py OUT NAME [NAME ...]."""

import hashlib
import shutil
import sys
from pathlib import Path

from inspect_ai import Epochs, Task, eval, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import GenerateConfig, ModelAPI, ModelOutput, modelapi
from inspect_ai.scorer import Score, accuracy, match, mean, scorer, stderr
from inspect_ai.solver import generate, solver

SKILL = {"small": 40, "large": 80}


@modelapi(name="sums")
class SumsAPI(ModelAPI):
    """Gives the right sum, or none, by a hash of the question and of how often it was asked."""

    def __init__(self, model_name, base_url=None, api_key=None, config=None, **arguments):
        super().__init__(model_name, base_url, api_key, [], config or GenerateConfig())
        self.questions = []

    async def generate(self, input, tools, tool_choice, config):
        question = input[0].text
        self.questions.append(question)
        word = f"{self.model_name} {question} {self.questions.count(question)}"
        number = int(hashlib.sha256(word.encode()).hexdigest(), 16) % 100
        text = "no idea"
        if number < SKILL[self.model_name]:
            text = str(2 * int(question.split()[2]))
        return ModelOutput.from_content(f"sums/{self.model_name}", text)


@scorer(metrics=[accuracy(), stderr()])
def partly():
    async def score(state, target):
        number = int(hashlib.sha256(state.output.completion.encode()).hexdigest(), 16)
        return Score(value="CIPN"[number % 4])

    return score


@scorer(metrics={"right": [mean(), stderr()], "length": [mean()]})
def both():
    async def score(state, target):
        text = state.output.completion
        return Score(value={"right": float(text == target.text), "length": len(text)})

    return score


@solver
def failing():
    async def solve(state, generate):
        if state.sample_id == "q1":
            raise ValueError("broken")
        return state

    return solve


@task
def sums(n: int = 6, fails: bool = False):
    samples = [Sample(input=f"What is {i} + {i}?", target=str(2 * i), id=f"q{i}") for i in range(n)]
    solvers = [generate(), failing()] if fails else [generate()]
    scorers = [match(location="exact"), partly(), both()]
    return Task(MemoryDataset(samples, name="sums"), solver=solvers, scorer=scorers, version=2)


LOGS = {
    "small.eval": ("small", {}, {}),
    "large.eval": ("large", {}, {}),
    "epochs.eval": ("small", {"n": 3}, {"epochs": Epochs(2, ["mean", "max"])}),
    "large.json": ("large", {"n": 2}, {"log_format": "json"}),
    "failed.eval": ("large", {"n": 2, "fails": True}, {}),
    "errors.eval": ("large", {"n": 4, "fails": True}, {"fail_on_error": False, "limit": 2}),
    "limited.eval": ("large", {"n": 4}, {"message_limit": 1, "sample_id": ["q1", "q2"]}),
}

if __name__ == "__main__":
    out = Path(sys.argv[1])
    for name in sys.argv[2:]:
        model, arguments, options = LOGS[name]
        options = {"display": "none", "log_format": "eval"} | options
        (log,) = eval(
            sums(**arguments), model=f"sums/{model}", log_dir=str(out / "logs"), **options
        )
        shutil.copy(log.location, out / name)
        print(name, log.status, (out / name).stat().st_size, log.error and log.error.message)
