"""``python -m benchmarks.starting``: ``deepseek-train`` up to its first step, its phases noted."""
