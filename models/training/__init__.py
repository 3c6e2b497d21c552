"""Training of a small byte-level model with sparse attention: its text, its long-range tasks, its loop."""
