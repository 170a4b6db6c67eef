"""From a resolved recipe to trained weights: model, trainer, checkpoints, stopping."""
