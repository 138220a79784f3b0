"""Names the stage of somebody's trainer that broke, from what a recorder kept of it."""
