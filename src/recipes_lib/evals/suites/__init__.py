"""The suites, one file each. A new one is such a file, and a line here and in
`evals.recipe.SUITES`.
"""

from __future__ import annotations

from recipes_lib.evals.suites.alpaca_eval import AlpacaEval
from recipes_lib.evals.suites.checks import Checks
from recipes_lib.evals.suites.heldout_loss import HeldoutLoss
from recipes_lib.evals.suites.lm_eval import LMEval
from recipes_lib.evals.suites.mt_bench import MTBench

SUITE_CLASSES = {
    "alpaca_eval": AlpacaEval,
    "mt_bench": MTBench,
    "lm_eval": LMEval,
    "checks": Checks,
    "heldout_loss": HeldoutLoss,
}
