"""How good a model is: perplexity of a text."""
