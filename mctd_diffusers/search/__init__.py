"""Numbers and trees: the search itself. Nothing in this room imports torch or diffusers."""
