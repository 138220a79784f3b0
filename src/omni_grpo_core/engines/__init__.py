"""Rollout engines: who samples a step's completions, and the proof that what an engine reads and
how it scores is what the trainer trains on."""
