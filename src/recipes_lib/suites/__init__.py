"""The evaluation suites: eval recipes, questions, AlpacaEval, MT-Bench and lm-eval. They read
answers and judgments and never train.
"""
