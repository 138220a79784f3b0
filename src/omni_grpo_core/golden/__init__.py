"""Stored outputs, reviewed like code: one text file per case and stage."""
