"""Speed and recipe, measured beside stock diffusers: `python -m benchmarks.NAME` from the root of the repository."""
