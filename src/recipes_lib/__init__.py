"""Recipes for fine-tuning language models, and conclusions that can be believed."""

import logging

__version__ = "0.1.0"

# At import bitsandbytes reports a kernel that it could fetch from the Hub; nothing here needs it.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
