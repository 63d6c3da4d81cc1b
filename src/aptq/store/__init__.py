"""Checkpoints on disk: exact sizes before the run, crash-safe writing, checked reading."""
