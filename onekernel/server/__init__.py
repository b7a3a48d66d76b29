"""The HTTP server: OpenAI's and Anthropic's APIs over one model. One API a file; `app.py` puts them together."""
