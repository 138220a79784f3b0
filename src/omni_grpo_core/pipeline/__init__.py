"""The stages of a pass as one graph, what must hold at each, and what to do where it does not."""
