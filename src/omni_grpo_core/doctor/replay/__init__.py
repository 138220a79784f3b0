"""What the reference pipeline makes of the inputs that were recorded."""
