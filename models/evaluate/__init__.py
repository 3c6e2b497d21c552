"""Evaluation by lm-eval's tasks, the same questions to each indexer; docs/evaluate.md shows how."""
