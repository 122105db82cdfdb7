"""Benchmark suite: one registry of implementations, a correctness gate before every timing, JSON, tables, plots."""
