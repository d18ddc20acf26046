"""What happens to a finished picture: its metadata and its file."""
