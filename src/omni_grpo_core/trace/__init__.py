"""Values that a pass leaves behind: saved, loaded, sketched and compared. Knows no stage."""
