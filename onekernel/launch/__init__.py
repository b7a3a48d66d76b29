"""Starts an installed client (a coding agent, a chat front end) against a server, with a configuration of its own."""
