"""The run directory: its layout, states, lock, and the record of how a run came to be."""
