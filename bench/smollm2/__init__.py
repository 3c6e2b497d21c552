"""The quality lab on a real language model: SmolLM2-135M-Instruct with trained indexers in all of its layers."""
