"""What saves, loads and pushes, and the losses that train it."""
