"""Latents, schedulers and the network; this room knows no trees."""
