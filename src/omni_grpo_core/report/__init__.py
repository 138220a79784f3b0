"""What a check found, for people: a page of one file and a terminal rendering. Judges nothing."""
