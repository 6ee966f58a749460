"""What tests of a server need, llorch's own and those of whoever builds on it. Nothing here serves a model."""
