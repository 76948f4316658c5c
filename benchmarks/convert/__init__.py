"""Sources of the benchmark of conversions."""
