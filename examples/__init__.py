"""Complete runs: configurations, and the demonstration that `make demo` gives."""
