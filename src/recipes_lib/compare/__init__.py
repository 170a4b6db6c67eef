"""Comparing runs: what was measured, the study that declares what differs, tests, reasons not to
believe them, and sentences.

What is said comes from tests alone. Reads files, never models; needs no torch.
"""
