"""Speed of unembed, as ratios: each `bench_*` module is a command that prints a table."""
