"""Files, settings, exits and what a command shares: nothing here knows of models."""
