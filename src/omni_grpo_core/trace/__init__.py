"""Values that a pass or a recorded trainer leaves: saved, loaded, fingerprinted, compared."""
