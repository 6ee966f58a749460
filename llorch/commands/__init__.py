"""The commands of `llorch`: one module each, imported only when it runs."""
