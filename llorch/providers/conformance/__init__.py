"""What every provider is held to."""
