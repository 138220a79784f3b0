"""What a step costs: the usual way, the plain step and the fast one, side by side in one run.

On the same weights and the same tokens, and beside the floor that the device's own speed sets.
"""
