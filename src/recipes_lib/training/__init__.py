"""From a resolved recipe to trained weights: model, trainer, checkpoints, stopping, and the check
of what was saved.
"""
