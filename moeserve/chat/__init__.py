"""The chat CLI: a conversation in the terminal, with a model here or on a server."""
