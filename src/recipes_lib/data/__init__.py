"""From rows on disk to token ids and the mask of the loss: sources -> columns -> prompts -> splits
-> supervision -> audit, in the order of `preparation.prepare_data`.
"""
