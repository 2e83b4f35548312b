"""Benchmarks that need no model: `moeserve bench …`."""
