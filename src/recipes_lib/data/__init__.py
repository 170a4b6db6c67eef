"""From rows on disk to token ids and labels: rows -> prompts -> prepare. And leaks of evals."""
