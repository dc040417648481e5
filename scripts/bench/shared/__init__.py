"""What benchmarks and tests share: oracles and replayed or simulated searches."""
