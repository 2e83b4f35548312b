"""The planner's benchmark: what it predicts beside what the engine then does."""
