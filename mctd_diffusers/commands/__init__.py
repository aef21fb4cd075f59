"""The commands that are long enough for files of their own, and what all commands share."""
