"""From rows on disk to token ids and the mask of the loss: sources -> columns -> prompts -> splits
-> supervision -> audit.

`preparation.prepare_data` walks through these modules in that order; each of them can be used and
tested on its own.
"""
