"""Slurm: a site's profile, the scripts of jobs, their submission and what became of them."""
