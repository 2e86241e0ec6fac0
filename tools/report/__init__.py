"""What a run reached: a table, transcripts and its curves, from its folder alone."""
