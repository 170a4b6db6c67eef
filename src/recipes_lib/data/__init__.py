"""From rows on disk to token ids and the mask of the loss: sources -> columns -> splits -> prompts
-> supervision -> audit, as `prepare.prepare_data` calls them.
"""
