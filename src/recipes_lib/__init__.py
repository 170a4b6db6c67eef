"""Recipes for fine-tuning language models, and conclusions that can be believed."""

__version__ = "0.1.0"
