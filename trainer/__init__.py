"""The weights lever: updates a LoRA adapter on logged rollouts."""
