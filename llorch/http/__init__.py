"""The HTTP side of llorch: the worker contract over Litestar."""
