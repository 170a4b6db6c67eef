"""Foreign results as runs: recognising other programs' files, and writing what they hold in our
formats (`recipes import`).

Nothing is made up: a second order, a missing turn, a number of items or a step that the files do
not hold stays absent, and is named.
"""
