"""What is to be run for a recipe or a study, in which order, and with what; no scheduler."""
