"""Checks whether a server keeps to the APIs that clients rely on: any server, seen only through HTTP."""
