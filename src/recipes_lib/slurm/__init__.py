"""Clusters: a recipe or a study and a site profile become Slurm jobs that depend on each other, and
are watched from the login node.
"""
