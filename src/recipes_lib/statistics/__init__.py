"""Statistics on plain numpy arrays: intervals, paired tests, corrections, power, agreement. No
files, no models, no printing.

Every function answers for every n: no item, one item, all ties or no variance give `None` where a
number would be a guess.
"""
