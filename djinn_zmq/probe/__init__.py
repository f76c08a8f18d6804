"""What benchmarks and latency tools share: samples, rounds, pinning, tables, results."""
