"""What is particular to a model: its architecture, its shape, its files on disk."""
