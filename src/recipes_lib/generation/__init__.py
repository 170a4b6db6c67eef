"""Answers from models: one engine protocol, an engine in this process and one behind an
OpenAI-compatible address, and the answer file.

Nothing here knows a suite or a judge.
"""
