"""What the reference pipeline computes from the recorded inputs."""
