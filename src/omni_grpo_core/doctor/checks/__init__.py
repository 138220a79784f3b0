"""What is wrong with a recording: from its calls to evidence, stage by stage."""
