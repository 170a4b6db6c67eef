"""Running a study: the graph of its steps, what is out of date, trainings, evaluations, and its
conclusion.
"""
