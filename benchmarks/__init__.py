"""Speed and quality as commands: each prints a table for people and, as its last line, one JSON object."""
