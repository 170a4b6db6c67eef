"""Other programs' files: as runs of ours (`recipes import`), and as what their judgments rest on
(`recipes judge replay`). A second order, a turn, an n or a step that a file does not hold stays
absent, and is named.
"""
