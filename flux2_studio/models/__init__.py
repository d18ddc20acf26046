"""Finds and downloads weights (`hub`), and loads them and manages their memory (`manager`)."""
