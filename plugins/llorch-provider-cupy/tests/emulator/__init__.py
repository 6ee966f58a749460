"""The provider's kernels and its Python side on the host: a runtime without a card, for tests alone."""
