"""Comparing runs: what was measured, the tested table, reasons not to believe it, and sentences.

Reads files and never models; needs no torch.
"""
