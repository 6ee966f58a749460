"""The OpenAI API: chat completions, completions and models, over the engine that the worker contract speaks to."""
