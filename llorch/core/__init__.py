"""The model side of llorch: files, graph, cache, sampling, engine. Knows no provider and no HTTP."""
