"""The generator of malformed files: each is distinct, and says what must be said of it."""
