"""Values that a pass leaves behind: saved, loaded, fingerprinted and compared. Knows no stage."""
