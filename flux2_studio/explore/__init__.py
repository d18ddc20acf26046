"""Explorations: a request and the values that vary become cells, one run each, and a contact sheet."""
