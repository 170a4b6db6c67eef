"""What a training needs before it is started: memory, steps, time, and what to change."""
