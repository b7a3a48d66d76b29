"""Batch jobs: a file of requests in, a file of answers out, that a kill interrupts but does not spoil."""
