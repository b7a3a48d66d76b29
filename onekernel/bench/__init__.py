"""Benchmarks: this engine and others on one model, one machine, one sequence of tokens, against the limit.

Data flow: checkpoint -> limit (probe, ceiling) -> engines, each in a process of its own (protocol, own, peers)
-> gate -> measurements (run) -> document -> report, compare.
"""
