"""A whole model put into few bits."""
