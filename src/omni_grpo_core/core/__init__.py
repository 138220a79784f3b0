"""The minimal core, from a row of a data set to sampled completions."""
