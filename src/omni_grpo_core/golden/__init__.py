"""Stored outputs that are reviewed like code: one text file per case and stage."""
