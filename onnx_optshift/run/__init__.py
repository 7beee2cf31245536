"""One run's resources: the model opened, its data arranged, sessions, outputs and memory under one budget."""
