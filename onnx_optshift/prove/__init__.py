"""Does a written file do what was promised? Noise of the original, comparison of outputs, comparison of bytes."""
