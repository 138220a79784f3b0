"""Names the stage of a trainer that is at fault, from a recording of it."""
