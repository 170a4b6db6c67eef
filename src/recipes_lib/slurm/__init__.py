"""Clusters: a recipe or a study and a site profile become a chain of Slurm jobs."""
