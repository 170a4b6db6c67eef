"""Arms of made-up values, in memory, for the whole way from values to claims."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from recipes_lib.analysis.aims import Aims, Margin
from recipes_lib.analysis.claims import Conclusion, conclude
from recipes_lib.analysis.looks import looks_after
from recipes_lib.analysis.runs import ArmRuns, Arms, Run
from recipes_lib.evals.log import AnswerFacts, EvalLog, Metric, Sample

NAME = "rules/pass_rate"
Table = NDArray[np.float64]  # seeds x questions


def arms_with(tables: Mapping[str, Table]) -> Arms:
    """Return arms that were trained with these results, a row for each seed."""
    arms = {}
    for arm, table in tables.items():
        runs = []
        for seed, values in enumerate(table):
            name = f"{arm}--{seed}"
            file = Path(name) / "evals" / "rules" / "result.json"
            samples = [
                Sample(id=f"q{number}", value=float(value), outcome="scored")
                for number, value in enumerate(values)
            ]
            metric = Metric("pass_rate", "pass rate", tuple(samples), unit="share")
            metric = Metric(**(vars(metric) | {"value": float(values.mean()), "n": len(values)}))
            log = EvalLog(
                suite="checks",
                eval="rules",
                target=name,
                metrics=(metric,),
                answers=AnswerFacts(name=name, models=("some/model",), fingerprint=name),
                recipe={"suite": {"name": "checks"}},
                file=file,
            )
            model = {"name_or_path": "some/model"}
            run = Run(
                name=name,
                folder=Path(name),
                state={"state": "finished"},
                resolved={"model": model, "train": {"seed": seed}},
                evals=(log,),
                seed=seed,
            )
            runs.append(run)
        arms[arm] = ArmRuns(arm, tuple(runs))
    return Arms(arms)


def at_looks(
    tables: Mapping[str, Table], seeds: Sequence[int], margin: float | None = None
) -> Iterator[Conclusion]:
    """Yield what a study concludes at each look, up to the one where it stops."""
    margins = {"pass_rate": Margin(margin)} if margin else {}
    for look in looks_after(seeds, len(tables)):
        first = {arm: table[: look.seeds] for arm, table in tables.items()}
        conclusion = conclude(arms_with(first), Aims("pass_rate", margins, look=look))
        yield conclusion
        if not conclusion.undecided:
            return


def answers(
    rates: Sequence[float], seeds: int, questions: int, spread: float, rng: np.random.Generator
) -> dict[str, Table]:
    """Return 0/1 answers of arms with these rates, to questions of unequal difficulty."""
    hard = rng.uniform(-0.15, 0.15, questions)
    tables = {}
    for number, rate in enumerate(rates):
        chance = rate + hard + rng.normal(0, spread, (seeds, 1))
        tables[f"arm{number}"] = (rng.random((seeds, questions)) < chance) * 1.0
    return tables
