"""A run as a web server: a page to click in, and the routes that it and other viewers use (docs/serve.md)."""
