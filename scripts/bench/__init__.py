"""The benchmarks: what prints results/."""
