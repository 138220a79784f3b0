"""What each version of transformers changes for an omni batch: measured, then told as a table."""
