"""Dense checkpoints into Mixture-of-Experts checkpoints: docs/conversion.md."""
