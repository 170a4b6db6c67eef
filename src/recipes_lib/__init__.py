"""Recipes for fine-tuning language models, and conclusions that can be believed."""

import logging
import os

__version__ = "0.1.0"

# At import bitsandbytes reports a kernel that it could fetch from the Hub; nothing here needs it.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

# TRL tells the Hub which trainer was made; the Hub's libraries read this when they are imported.
# HF_HUB_DISABLE_TELEMETRY=0 allows it.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
