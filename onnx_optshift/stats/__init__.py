"""Second moments of layer inputs."""
