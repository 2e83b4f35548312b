"""Tools that watch a model route: train and evaluate predictors, record routing."""
