"""Data, model, training loop and model card of the bundled tiny Mixture-of-Experts model."""
