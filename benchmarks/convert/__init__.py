"""Models that the benchmark of conversions converts."""
