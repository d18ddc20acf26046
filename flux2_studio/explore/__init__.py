"""Trying many ideas at once: a request and what is to vary become cells, a run each, and one sheet of them all."""
