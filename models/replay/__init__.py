"""Selection replay: what a rollout's queries selected and which experts its tokens took, run again in training."""
