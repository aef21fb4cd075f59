"""The tree of a search as a picture, and samples side by side."""
